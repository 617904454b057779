import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import commands
from lstm_jax.data import files
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import lock

HOLD = """
import sys, time
from pathlib import Path
from lstm_jax.data import files
from lstm_jax.run import lock
with lock.hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(directory: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.process
def test_a_second_process_fails_until_the_first_is_dead(tmp_path: Path) -> None:
    first = start_holder(tmp_path)
    with pytest.raises(UserError, match=f"process {first.pid} on .* is training in"):
        lock.hold_lock(tmp_path).__enter__()
    first.kill()
    first.wait()
    assert (tmp_path / lock.LOCK).exists()
    with lock.hold_lock(tmp_path) as check_held:
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
        check_held()
    assert not (tmp_path / lock.LOCK).exists()


@pytest.mark.parametrize("ahead", [0, 365 * 24 * 3600])  # Its clock may be wrong.
@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1, "since": "noon"}', "garbage"])
def test_a_lock_of_another_host_expires(content: str, ahead: int, tmp_path: Path) -> None:
    path = tmp_path / lock.LOCK
    path.write_text(content)
    os.utime(path, (time.time() + ahead, time.time() + ahead))
    with pytest.raises(UserError, match="is training in .* try again in 60 seconds"):
        lock.hold_lock(tmp_path).__enter__()
    assert path.read_text() == content
    assert abs(path.stat().st_mtime - time.time()) < 5, "its age is counted from now on"
    before = time.time() - lock.STALE_SECONDS - 1
    os.utime(path, (before, before))
    with lock.hold_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.process
def test_without_file_system_locks_the_process_id_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*unused: object) -> None:
        raise OSError(95, "Operation not supported")

    first = start_holder(tmp_path)
    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(UserError, match=f"process {first.pid} on"):
        lock.hold_lock(tmp_path).__enter__()
    first.kill()
    first.wait()
    with lock.hold_lock(tmp_path) as check_held:
        check_held()


def test_a_process_that_lost_the_lock_detects_it(tmp_path: Path) -> None:
    with lock.hold_lock(tmp_path) as check_held:
        path = tmp_path / lock.LOCK
        path.unlink()
        path.write_text("of another")
        with pytest.raises(UnavailableError, match="has taken over .*: nothing more is written"):
            check_held()
    assert path.read_text() == "of another", "it is not ours to remove"


def test_a_held_lock_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    with lock.hold_lock(tmp_path):
        path = tmp_path / lock.LOCK
        os.utime(path, (0, 0))
        commands.wait_until(lambda: time.time() - path.stat().st_mtime < 60, seconds=10)


def test_directories_that_stay_empty_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with lock.hold_lock(tmp_path / "mine" / "runs" / "a"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with lock.hold_lock(tmp_path / "mine" / "runs" / "a"):
        (tmp_path / "mine" / "runs" / "a" / "kept").touch()
    assert (tmp_path / "mine" / "runs" / "a" / "kept").exists()
