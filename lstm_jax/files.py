"""Files written whole or not at all, and JSON that notices when it was changed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and onto the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Makes sure that what was renamed in a directory is so after a power cut too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, fields: Mapping[str, Any], indent: int = 2) -> None:
    """Writes `fields` as JSON, with their checksum."""
    sealed = {**fields, "sha256": _checksum(fields)}
    text = json.dumps(sealed, indent=indent, ensure_ascii=False) + "\n"
    # Names of files can hold bytes that are no UTF-8, which Python keeps as surrogates.
    write(path, text.encode("utf-8", "surrogateescape"))


def read_json(path: Path) -> dict[str, Any]:
    """The fields that `write_json` wrote.

    Raises:
      ValueError: if they are not what was written.
      OSError: if the file can't be read.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _checksum(fields):
        raise ValueError("its fields don't have the checksum that it holds")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
