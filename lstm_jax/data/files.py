"""Write files atomically, with checksums."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def hash_file(path: Path, sync: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal; if `sync`, flush it to disk first."""
    with path.open("rb") as file:
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
    """Return the fields that `write_json` wrote; raise `ValueError` if the checksum differs."""
    try:
        fields = json.loads(path.read_bytes().decode("ascii"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _checksum(fields):
        raise ValueError("its checksum does not match its fields")
    return fields


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
