"""Write files whole or not at all, read them with a size limit, lock and hash them.

A working directory, a study or a prepared corpus may come from someone else. So only regular files
of a limited size are read, never links, and nothing is written through a link that already exists.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import IO, Any

# The end of the name of a file or directory that is still being written.
PARTIAL = ".partial"
_UNFINISHED = ".unfinished"
_MEGABYTE = 2**20
# Errors of flock on file systems that have no locks.
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def open_regular(path: Path, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading; never a pipe or a device, which may have no end.

    Args:
      path: of the file.
      follow: whether the file may be a link, as one may that the user has named.

    Raises:
      OSError: if it is not a regular file, is a link, or can't be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    return _open(path, flags if follow else flags | os.O_NOFOLLOW, "rb")


def open_append(path: Path) -> BufferedWriter:
    """Open a regular file for appending; create it if it does not exist.

    Raises:
      OSError: if it is not a regular file, is a link, or can't be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    return _open(path, flags, "ab")


def _open(path: Path, flags: int, mode: str) -> Any:
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "It is a link, which is not followed", str(path)) from None
        if error.errno == errno.ENXIO:  # A pipe without a reader, or a socket.
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
    """Read a regular file; raise `OSError` if it has more than `limit` bytes."""
    with open_regular(path, follow) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        size = f"{limit / _MEGABYTE:g} MiB" if limit >= _MEGABYTE else f"{limit:,} bytes"
        raise OSError(errno.EFBIG, f"It is larger than {size}", str(path))
    return content


def read_tail(path: Path, limit: int) -> bytes:
    """Read at most the last `limit` bytes of a regular file."""
    with open_regular(path) as file:
        file.seek(max(os.fstat(file.fileno()).st_size - limit, 0))
        return file.read(limit)


def hash_file(path: Path, sync: bool = False) -> str:
    """Return the SHA-256 of a regular file in hexadecimal; if `sync`, flush it to disk first."""
    with open_regular(path) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(file: int | IO[bytes], wait: bool = False) -> bool:
    """Lock an open file or directory until it is closed or the process ends, however it ends.

    Args:
      file: the open file, or its descriptor.
      wait: whether to wait while another process holds the lock.

    Returns:
      True, or False if the file system has no locks.

    Raises:
      BlockingIOError: if another process holds the lock and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and flush it to disk. A link at `path` is replaced."""
    if path.is_dir() and not path.is_symlink():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # A random name, at which nobody can have put a link.
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
    """Remove what `write_file` left in killed processes; no other process may be writing."""
    for path in directory.glob(f".{'[0-9a-f]' * 16}{PARTIAL}"):
        path.unlink()


@contextlib.contextmanager
def unfinished_directory(target: Path) -> Iterator[Path]:
    """Make a directory beside `target` to work in; remove it at the end unless it was renamed.

    Those of killed processes are removed first: a living process holds a lock on its own.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    left = f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}{_UNFINISHED}"
    for path in target.parent.glob(left):
        with contextlib.suppress(OSError), _open_directory(path) as descriptor:
            if lock_file(descriptor):
                shutil.rmtree(path)
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_UNFINISHED}")
    path.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        with contextlib.suppress(OSError):  # Some network file systems lock no directories.
            lock_file(stack.enter_context(_open_directory(path)))
        yield path


@contextlib.contextmanager
def _open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk, so that a rename survives a power failure."""
    with _open_directory(path) as descriptor:
        os.fsync(descriptor)


def write_json(path: Path, fields: Mapping[str, Any], indent: int = 2) -> None:
    """Write `fields` with their checksum as JSON in ASCII."""
    sealed = {**fields, "sha256": _checksum(fields)}
    write_file(path, (json.dumps(sealed, indent=indent) + "\n").encode("ascii"))


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Return the fields that `write_json` wrote, from a file of at most `limit` bytes.

    Raises:
      ValueError: if they don't have the checksum in the file.
      OSError: as `read_bytes` does.
    """
    try:
        # Earlier versions wrote bytes that are not UTF-8 unescaped.
        fields = json.loads(read_bytes(path, limit).decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _checksum(fields):
        raise ValueError("its fields don't have the checksum that it holds")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
