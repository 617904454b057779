"""Lock a working directory, so that one process at a time trains in it."""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lstm_jax.data import files
from lstm_jax.devices import hosts
from lstm_jax.errors import UnavailableError, UserError, name_other_directory

LOCK = ".lock"
# The holder touches the lock this often; one that was not touched for a minute is stale.
_BEAT_SECONDS = 10
STALE_SECONDS = 60


@contextlib.contextmanager
def hold_lock(directory: Path) -> Iterator[Callable[[], None]]:
    """Make `directory` and hold its lock; at the end, remove the directories it made if empty.

    The operating system releases the lock with the process, however it ends. Between hosts, where
    the file system may not share locks, a lock that was not touched for a minute counts as free.
    Process 0 holds it for all processes of a run, which call this after it.

    Yields:
      A function to call before writing. It raises `UnavailableError` if this process has lost the
      lock to another host, as it can if it was suspended for more than a minute.

    Raises:
      UnavailableError: if a process of another run holds the lock, or the directory can't be
        written.
      UserError: if another process of this run does not see the directory.
    """
    if not hosts.is_first():
        for _ in range(STALE_SECONDS):  # NFS may hide what another host has made for so long.
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
    done = threading.Event()

    def check_held() -> None:
        if not _is_at(lock, path):
            raise UnavailableError(
                f"{directory} was moved or deleted, or another process has taken over the run, as "
                f"this one was suspended for more than {STALE_SECONDS} seconds: nothing more is "
                "written"
            )

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # A disk may fail temporarily.
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield check_held
    finally:
        done.set()
        thread.join()
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
        with contextlib.ExitStack() as opened:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            opened.callback(os.close, lock)
            try:
                locked = files.lock_file(lock)
            except BlockingIOError:
                raise _held(path, _read_holder(lock)) from None
            if not _is_at(lock, path):
                continue
            holder = _read_holder(lock)
            if not holder:
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
                os.pwrite(lock, (json.dumps(me) + "\n").encode(), 0)
                os.fsync(lock)  # So that other hosts can read it on a network file system.
                opened.pop_all()
                return lock
            if _may_be_alive(holder, locked, path):
                raise _held(path, holder)
            # With a new file, a suspended holder can see that it lost the lock.
            path.unlink()


def _is_at(lock: int, path: Path) -> bool:
    """Return whether an open lock file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _read_holder(lock: int) -> dict[str, object]:
    """Return the host, pid and start time in a lock file; {} if it is empty."""
    with contextlib.suppress(ValueError, RecursionError):
        holder = json.loads(os.pread(lock, 1000, 0) or b"{}")
        if isinstance(holder, dict):
            return holder
    return {"host": "an unknown host"}


def _may_be_alive(holder: dict[str, object], locked: bool, path: Path) -> bool:
    """Return whether a lock's holder may still run; `locked`: whether flock succeeded."""
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        # A living process of this host would still have the file locked.
        if locked or not isinstance(pid, int) or not _is_running(pid):
            return False
    # Compare times of the file system: its clock may differ from this host's.
    with tempfile.TemporaryFile(dir=path.parent) as now:
        age = os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    if age < 0:
        os.utime(path)  # The holder's clock was ahead: the minute starts now.
    return age < STALE_SECONDS


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


def _held(path: Path, holder: dict[str, object]) -> UnavailableError:
    fields = {"pid": "unknown", "host": "an unknown host", "since": "an unknown time", **holder}
    return UnavailableError(
        f"process {fields['pid']} on {fields['host']} is training in {path.parent} (since "
        f"{fields['since']}): wait until it ends, stop it, or use {name_other_directory()}; if it "
        f"is dead already, try again in {STALE_SECONDS} seconds"
    )
