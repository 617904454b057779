"""Write files atomically, with checksums; read them, also those of strangers."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LARGEST_JSON = 2**27  # Bytes. The objects of JSON can take 30 times more memory.


def check_file(path: Path) -> Path:
    """Return the path of a regular file, or of a link to one; raise `OSError` for any other.

    Reading a device or a pipe may never end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path


def hash_file(path: Path, sync: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal; if `sync`, flush it to disk first."""
    with check_file(path).open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes | Iterable[memoryview]) -> None:
    """Write bytes, or pieces of them, to a file atomically, and flush it to disk."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk, so that a rename survives a power failure."""
    # What was renamed is complete, also where this is not supported.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, fields: Mapping[str, object], indent: int = 2) -> None:
    """Write `fields` with their checksum as JSON in ASCII."""
    sealed = {**fields, "sha256": _checksum(fields)}
    write_file(path, (json.dumps(sealed, indent=indent) + "\n").encode("ascii"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the fields that `write_json` wrote.

    Raise `OSError` if it can't be read, and `ValueError` if its checksum differs.
    """
    if check_file(path).stat().st_size > _LARGEST_JSON:
        raise ValueError("it is too large")
    try:
        fields = json.loads(path.read_bytes().decode("ascii"))
        if isinstance(fields, dict) and fields.pop("sha256", None) == _checksum(fields):
            return fields
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    raise ValueError("its checksum does not match its fields")


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
