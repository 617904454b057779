"""Write files atomically, read them with a size limit, lock and hash them.

A working directory may come from someone else. So only regular files of a limited size are read
there, never links, and nothing is written through a link that already exists.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import IO, Any

from lstm_jax.errors import UserError

# Suffixes of a file and a directory that are still being written.
_PARTIAL, _UNFINISHED = ".partial", ".unfinished"
# Errors of flock on file systems that have no locks.
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def open_regular(path: Path, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading; raise `OSError` if that fails or it is another kind of file.

    Pipes and devices may have no end. If `follow`, it may be a link, for files that the user names.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    return os.fdopen(_open(path, flags if follow else flags | os.O_NOFOLLOW), "rb")


def open_append(path: Path) -> BufferedWriter:
    """Open a regular file, or a new one, for appending; raise `OSError` if it is another kind."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    return os.fdopen(_open(path, flags), "ab")


def _open(path: Path, flags: int) -> int:
    not_regular = OSError(errno.EINVAL, "It is not a regular file", str(path))
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "It is a link, which is not followed", str(path)) from None
        # EISDIR: a directory; ENXIO: a pipe without a reader, or a socket.
        raise not_regular if error.errno in (errno.EISDIR, errno.ENXIO) else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular
    return descriptor


def read_bytes(path: Path, limit: int, follow: bool = False) -> bytes:
    """Read a regular file; raise `OSError` if it has more than `limit` bytes."""
    with open_regular(path, follow) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        size = f"{limit / 2**20:g} MiB" if limit >= 2**20 else f"{limit:,} bytes"
        raise OSError(errno.EFBIG, f"It is larger than {size}", str(path))
    return content


def read_tail(path: Path, limit: int) -> bytes:
    """Read at most the last `limit` bytes of a regular file; b"" if there is none."""
    with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
        file.seek(max(os.fstat(file.fileno()).st_size - limit, 0))
        return file.read(limit)
    return b""


def hash_file(path: Path, sync: bool = False) -> str:
    """Return the SHA-256 of a regular file in hexadecimal; if `sync`, flush it to disk first."""
    with open_regular(path) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(file: int | IO[bytes], waiting: str = "") -> bool:
    """Lock an open file or directory until it is closed or the process ends, however it ends.

    If another process holds the lock, print the message `waiting` and wait, or without one raise
    `BlockingIOError`. Return False if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waiting:
            raise
        print(waiting, file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, and flush it to disk. A link at `path` is replaced."""
    # A random name, so that nobody can put a link there.
    partial = path.with_name(f".{secrets.token_hex(8)}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def remove_partial(directory: Path) -> None:
    """Remove files that `write_file` left when it was killed; no other process may be writing."""
    for path in directory.glob(f".{'[0-9a-f]' * 16}{_PARTIAL}"):
        path.unlink()


@contextlib.contextmanager
def unfinished_directory(target: Path) -> Iterator[Path]:
    """Make a directory that becomes `target` at the end of the block, or is removed if that fails.

    Directories of killed processes are removed first; a live process holds a lock on its directory.
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
        path.rename(target)
        sync_directory(target.parent)


@contextlib.contextmanager
def _open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk, so that a rename survives a power failure."""
    # What was renamed is complete, also where this is not supported. The user may name a link.
    with contextlib.suppress(OSError), _open_directory(path.resolve()) as descriptor:
        os.fsync(descriptor)


def write_json(
    path: Path,
    fields: Mapping[str, object],
    indent: int = 2,
    limit: float = math.inf,
    remedy: str = "",
) -> None:
    """Write `fields` with their checksum as JSON in ASCII; raise `UserError` above the limit."""
    sealed = {**fields, "sha256": _checksum(fields)}
    content = (json.dumps(sealed, indent=indent) + "\n").encode("ascii")
    if len(content) > limit:
        raise UserError(f"{path} would be larger than {limit / 2**20:g} MiB: {remedy}")
    write_file(path, content)


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Return the fields that `write_json` wrote; raise `ValueError` if the checksum differs."""
    try:
        fields = json.loads(read_bytes(path, limit).decode("ascii"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _checksum(fields):
        raise ValueError("its checksum does not match its fields")
    return fields


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
