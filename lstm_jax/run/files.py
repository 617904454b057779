"""Files that are written whole or not at all and read with a bound, and JSON with a checksum.

A working directory, a study or a prepared corpus may have been made by someone else. So what is
read must be a regular file of a bounded size, and no link; what is written never goes through a
link that was there before.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

# The end of the name of a file or directory that is still being written.
PARTIAL = ".partial"
_UNFINISHED = ".unfinished"
_MEGABYTE = 2**20


def open_regular(path: Path, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading.

    A pipe or a device, of which reading may never end, is not opened.

    Args:
      path: of the file.
      follow: whether the file may be a link. It may where the user has named it.

    Raises:
      OSError: if it is no regular file, is a link, or can't be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    return _checked(path, flags if follow else flags | os.O_NOFOLLOW, "rb")


def open_append(path: Path) -> BufferedWriter:
    """Open a regular file for appending; make it if it is not there.

    Raises:
      OSError: if it is no regular file, is a link, or can't be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    return _checked(path, flags, "ab")


def _checked(path: Path, flags: int, mode: str) -> Any:
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "It is a link, which is not followed", str(path)) from None
        if error.errno == errno.ENXIO:  # A pipe that nobody reads, or a socket.
            raise OSError(errno.EINVAL, "It is not a regular file", str(path)) from None
        raise
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "It is not a regular file", str(path))
        return os.fdopen(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int, follow: bool = False) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
      OSError: if it is larger, or `open_regular` raises it.
    """
    with open_regular(path, follow) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        size = f"{limit / _MEGABYTE:g} MiB" if limit >= _MEGABYTE else f"{limit:,} bytes"
        raise OSError(errno.EFBIG, f"It is larger than {size}", str(path))
    return content


def read_tail(path: Path, limit: int) -> bytes:
    """Read the last `limit` bytes of a regular file, or all of a shorter one.

    Raises:
      OSError: as `open_regular` does.
    """
    with open_regular(path) as file:
        file.seek(max(os.fstat(file.fileno()).st_size - limit, 0))
        return file.read(limit)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and onto the disk. A link at `path` is replaced.

    Raises:
      OSError: if it can't be written.
    """
    if path.is_dir() and not path.is_symlink():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # A name that nobody can have made a link of.
    partial = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(partial, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise


def remove_partial(directory: Path) -> None:
    """Remove what killed processes left behind of `write_file`; nobody else may write meanwhile."""
    for path in directory.glob(f".{'[0-9a-f]' * 16}{PARTIAL}"):
        path.unlink()


@contextlib.contextmanager
def unfinished_directory(target: Path) -> Iterator[Path]:
    """Make a directory beside `target` to work in; remove it at the end, if it is still there.

    Those of processes that were killed are removed first. A directory belongs to a process that
    holds a lock on it, which the operating system ends with the process.

    Raises:
      OSError: if none can be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{_escaped(target.name)}.{'[0-9a-f]' * 16}{_UNFINISHED}"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_UNFINISHED}")
    path.mkdir()
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, path, ignore_errors=True)
        with contextlib.suppress(OSError):  # Some network file systems lock no directories.
            held.enter_context(_locked(path))
        yield path


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _escaped(name: str) -> str:
    """A name as a pattern that only it matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sync_directory(directory: Path) -> None:
    """Make sure that what was renamed in a directory is so after a power cut too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, fields: Mapping[str, Any], indent: int = 2) -> None:
    """Write `fields` as JSON in ASCII, with their checksum."""
    sealed = {**fields, "sha256": _checksum(fields)}
    write_file(path, (json.dumps(sealed, indent=indent) + "\n").encode("ascii"))


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Return the fields that `write_json` wrote, from at most `limit` bytes.

    Raises:
      ValueError: if they are not what was written.
      OSError: if the file can't be read, as `read_bytes` raises it.
    """
    try:
        # Files of earlier versions hold bytes that are no UTF-8 as they are.
        fields = json.loads(read_bytes(path, limit).decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _checksum(fields):
        raise ValueError("its fields don't have the checksum that it holds")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
