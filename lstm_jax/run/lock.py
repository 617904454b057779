"""A lock on a working directory, so that one process at a time trains in it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lstm_jax.devices import hosts
from lstm_jax.errors import UnavailableError, UserError

LOCK = ".lock"
# Its holder touches the lock this often; one that was not touched for so long is nobody's.
_BEAT_SECONDS = 10
STALE_SECONDS = 60
# What flock raises on file systems that have no locks.
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def hold_lock(directory: Path) -> Iterator[Callable[[], bool]]:
    """Makes `directory` and holds its lock; takes away whatever it made that is empty at the end.

    The operating system ends the lock with the process, however it dies. Between hosts, where a
    file system may not pass locks on, a lock that was not touched for a minute counts as left
    behind.

    Yields:
      A function that says whether the lock is still this process's: one that was suspended for
      longer than a minute may have lost it to another host.

    Raises:
      UnavailableError: if another process holds the lock, naming it, or the directory can't be
        written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    except OSError as error:
        raise UnavailableError(f"can't write to {directory}: {error.strerror}") from None
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # A disk that fails now and then is no reason.
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lambda: _is_at(lock, path)
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _is_at(lock, path):
                path.unlink()
        os.close(lock)
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


def _acquire(path: Path) -> int:
    """The descriptor of the lock file, which this process now holds."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            locked = True
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UnavailableError(_refusal(path.parent, _holder(lock))) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                locked = False
            if _is_at(lock, path):
                holder = _holder(lock)
                if not holder:
                    me = {
                        "host": socket.gethostname(),
                        "pid": os.getpid(),
                        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                    }
                    os.pwrite(lock, (json.dumps(me) + "\n").encode(), 0)
                    return lock
                if _is_alive(holder, locked, path):
                    raise UnavailableError(_refusal(path.parent, holder))
                # A new file, so that a holder that wakes up again sees that it was replaced.
                path.unlink()
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    """Whether an open lock file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(lock: int) -> dict[str, object]:
    """Who wrote a lock file: host, pid and since when; empty if nobody did."""
    text = os.pread(lock, 1000, 0)
    if not text:
        return {}
    try:
        holder = json.loads(text)
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {"host": "an unknown host"}


def _is_alive(holder: dict[str, object], locked: bool, path: Path) -> bool:
    """Whether who wrote a lock file may still be at work, where flock gave us the lock or can't."""
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        # The system would not have given us what another process of this host holds.
        if locked or not isinstance(pid, int) or not _is_running(pid):
            return False
    # Both times are the file system's, whose clock may not be this host's.
    with tempfile.TemporaryFile(dir=path.parent) as now:
        age = os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    if age < 0:
        os.utime(path)  # Of a clock that was wrong: from now on it runs out as any other.
    return age < STALE_SECONDS


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _refusal(directory: Path, holder: dict[str, object]) -> str:
    fields = {"pid": "unknown", "host": "an unknown host", "since": "a while ago", **holder}
    return (
        f"process {fields['pid']} on {fields['host']} is training in {directory} (since "
        f"{fields['since']}): wait for its end, stop it, or name another --workdir; if it is no "
        f"more, try again in {STALE_SECONDS} seconds"
    )


def hold_lock_for_all(directory: Path) -> contextlib.AbstractContextManager[Callable[[], bool]]:
    """Return `hold_lock` of process 0, which holds the lock for all processes of a run.

    Raises:
      UserError: if another process does not see the directory.
    """
    if hosts.is_first():
        return hold_lock(directory)
    if not directory.exists():
        raise UserError(
            f"process {jax.process_index()} does not see {directory}, where process 0 trains: name "
            "the same --workdir for all, on a disk that they share"
        )
    return contextlib.nullcontext(lambda: True)


def read_holder(directory: Path) -> bytes:
    """Return the content of the lock file, which distinguishes working directories."""
    path = directory / LOCK
    return path.read_bytes() if path.exists() else b""
