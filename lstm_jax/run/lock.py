"""Lock a working directory, so that one process at a time trains in it."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lstm_jax.data import files
from lstm_jax.devices import hosts
from lstm_jax.errors import UnavailableError, UserError

LOCK = ".lock"


@contextlib.contextmanager
def hold_lock(directory: Path) -> Iterator[Callable[[], None]]:
    """Make `directory` and hold its lock; at the end, remove the directories it made if empty.

    The operating system releases the lock with the process, however it ends. On a file system
    without locks, nothing is locked. Process 0 holds it for all processes of a run, which call this
    after it.

    Yields:
      A function to call before writing. It raises `UnavailableError` if the directory was moved or
      deleted.

    Raises:
      UnavailableError: if a process of another run holds the lock, or the directory can't be
        written.
      UserError: if another process of this run does not see the directory.
    """
    if not hosts.is_first():
        for _ in range(60):  # NFS may hide for a minute what another host has made.
            if directory.exists():
                break
            time.sleep(1)
        else:
            raise UserError(
                f"process {jax.process_index()} does not see {directory}, where process 0 trains: "
                "name the same directory for all, on a disk that they share"
            )
        yield lambda: None
        return
    path = directory / LOCK
    try:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    except OSError as error:
        raise UnavailableError(f"can't write to {directory}: {error.strerror}") from None

    def check_held() -> None:
        if not _is_at(lock, path):
            raise UnavailableError(f"{directory} was moved or deleted: nothing more is written")

    try:
        yield check_held
    finally:
        with contextlib.suppress(OSError):
            if _is_at(lock, path):
                path.unlink()
            elif directory not in made:
                made.insert(0, directory)  # It was moved, and a save has made it again.
        os.close(lock)
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


def _acquire(path: Path) -> int:
    """Return the descriptor of the lock file, which this process now holds."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            files.lock_file(lock)
        except BlockingIOError:
            holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
            os.close(lock)
            raise UnavailableError(
                f"another process is training in {path.parent} ({holder}): wait until it ends, "
                f"stop it, or use another working directory"
            ) from None
        if _is_at(lock, path):
            break
        os.close(lock)  # Its holder has just removed it.
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{json.dumps(me)}\n".encode(), 0)
        os.fsync(lock)  # Other hosts can then read it.
    except OSError:
        os.close(lock)
        raise
    return lock


def _is_at(lock: int, path: Path) -> bool:
    """Return whether an open lock file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
