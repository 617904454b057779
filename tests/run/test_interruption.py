"""Test training processes that are killed, stopped, concurrent, or on a full disk."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import commands
import draws
import runs
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, workdir

pytestmark = pytest.mark.process


HOLD = """
import sys, time
from pathlib import Path
from lstm_jax.run import workdir
with workdir.hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

KILLED_IN_THE_FIRST_SAVE = """
import os, runpy, signal
import orbax.checkpoint as ocp
ocp.Checkpointer.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_module("lstm_jax.main", run_name="__main__", alter_sys=True)
"""


def list_undamaged(directory: Path) -> list[int]:
    """Return the steps of the checkpoints of a run, of which there are some, none damaged."""
    saved = directory / workdir.CHECKPOINTS
    steps = workdir.list_steps(saved)
    assert steps and all(checkpoints.find_damage(saved / str(step)) is None for step in steps)
    return steps


@contextlib.contextmanager
def mount_disk(directory: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size, in memory."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system")
    try:
        yield directory
    finally:
        # Lazily: files of commands that ran in this process may still be open.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill_disk(disk: Path) -> Path:
    """Append to a file until the disk is full, and return the file."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return filler


@pytest.mark.parametrize("number", range(draws.TIMES))
@pytest.mark.drawn
def test_a_run_killed_at_any_moment_ends_with_the_same_result(
    number: int, whole: Path, text_file: Path, tmp_path: Path
) -> None:
    chance = random.Random(f"{draws.SEED} {number}")
    arguments = runs.make_arguments(text_file, tmp_path / "run")
    for row in sorted(chance.sample(range(len(runs.read_losses(whole))), 2)):
        process = runs.start(arguments)
        runs.wait_for_rows(process, tmp_path / "run", row)
        time.sleep(chance.uniform(0, 0.2 if row else 3))  # Row 0 is written after three seconds.
        process.kill()
        process.communicate()
    result = commands.run("main", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    runs.assert_same(whole, tmp_path / "run")


def test_a_run_killed_in_its_first_save_starts_again(
    whole: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = runs.make_arguments(text_file, tmp_path / "run")
    command = [sys.executable, "-c", KILLED_IN_THE_FIRST_SAVE, *arguments]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    commands.get_output("main", *arguments)
    runs.assert_same(whole, tmp_path / "run")


def test_a_full_disk_stops_the_run_and_keeps_its_checkpoints(
    whole: Path, text_file: Path, tmp_path: Path
) -> None:
    with mount_disk(tmp_path / "disk", "8m") as disk:
        directory = disk / "run"
        arguments = runs.make_arguments(text_file, directory)
        process = runs.start(arguments)
        runs.wait_for_rows(process, directory, 12)
        filler = fill_disk(disk)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2, output
        assert "No space left" in errors and len(errors.splitlines()) == 1
        steps = list_undamaged(directory)
        # The disk is still full, including the space that the run has freed: the same error, and
        # nothing is lost. The remains of a failed save, which the next process removes, may have
        # had space for a later checkpoint.
        fill_disk(disk)
        again = commands.run("main", *arguments)
        assert again.returncode == 2 and "No space left" in again.stderr
        assert len(again.stderr.splitlines()) == 1
        assert list_undamaged(directory)[-1] >= steps[-1]
        filler.unlink()
        commands.get_output("main", *arguments)
        runs.assert_same(whole, directory)


def test_a_second_process_fails_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is training in .* \(process {first.pid} on .* since "):
        workdir.hold_lock(tmp_path).__enter__()
    first.kill()
    first.wait()
    for name in (".curves.png.1.partial", ".mine.partial"):
        (tmp_path / name).touch()
    with workdir.hold_lock(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine.partial"}
