"""Test that one process trains in a working directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lstm_jax.data import files
from lstm_jax.errors import UserError
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
    with pytest.raises(UserError, match=f'another process is training in .*"pid": {first.pid}'):
        lock.hold_lock(tmp_path).__enter__()
    first.kill()
    first.wait()
    assert (tmp_path / lock.LOCK).exists()
    with lock.hold_lock(tmp_path) as check_held:
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
        check_held()
    assert not (tmp_path / lock.LOCK).exists()


def test_a_file_system_without_locks_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*unused: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with lock.hold_lock(tmp_path) as check_held:
        check_held()


def test_directories_that_stay_empty_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with lock.hold_lock(tmp_path / "mine" / "runs" / "a"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with lock.hold_lock(tmp_path / "mine" / "runs" / "a"):
        (tmp_path / "mine" / "runs" / "a" / "kept").touch()
    assert (tmp_path / "mine" / "runs" / "a" / "kept").exists()
