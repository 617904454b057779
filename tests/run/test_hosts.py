"""Train in several processes on this machine, which communicate with Gloo as hosts do."""

import random
import re
import signal
import socket
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import draws
import lstm_jax
import runs
from lstm_jax.run import workdir

pytestmark = [pytest.mark.process, pytest.mark.drawn]


def find_free_address() -> str:
    """Return an address at which no process listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(text_file: Path, *directories: Path) -> list[subprocess.Popen[str]]:
    """Start all processes of a run, each with its working directory."""
    number = len(directories)
    flags = f"--coordinator_address={find_free_address()}", f"--num_processes={number}"
    return [
        runs.start(
            runs.make_arguments(
                text_file, path, f"--config.mesh.data={number}", *flags, f"--process_id={k}"
            )
        )
        for k, path in enumerate(directories)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for all processes, and return their exit codes and standard errors."""
    return [(p.returncode, errors) for p in processes for _, errors in [p.communicate(timeout=300)]]


def assert_close(one: Path, other: Path) -> None:
    """Assert that two runs have the same losses to 1e-5 and the same parameters to 5e-5.

    Several devices sum in another order, and the difference grows over 280 steps.
    """
    for (*a, loss), (*b, other_loss) in zip(
        runs.read_losses(one), runs.read_losses(other), strict=True
    ):
        assert a == b and abs(loss - other_loss) < 1e-5
    arrays, others = runs.load_final_state(one), runs.load_final_state(other)
    parameters = len(jax.tree.leaves(lstm_jax.load(one).params))
    for k, (a, b) in enumerate(zip(arrays, others, strict=True)):
        # The carry and the optimizer's moments have larger values.
        np.testing.assert_allclose(a, b, atol=5e-5 if k < parameters else 1e-3)


def test_a_lost_process_ends_the_others_and_the_same_command_resumes(
    whole: Path, text_file: Path, tmp_path: Path
) -> None:
    """Train on two meshes in turn, which processes lose or signals stop."""
    directory = tmp_path / "run"

    def wait(process: subprocess.Popen[str]) -> None:
        rows = len(runs.read_losses(directory)) if directory.exists() else 0
        runs.wait_for_rows(process, directory, rows + 3)

    for victim in (0, 1) if draws.TIMES > 1 else (random.Random(draws.SEED).randrange(2),):
        processes = start(text_file, directory, directory)
        wait(processes[0])
        processes[victim].kill()
        # The heartbeat's timeout is 30 s.
        _, errors = processes[1 - victim].communicate(timeout=150)
        assert processes[1 - victim].returncode != 0
        assert "Traceback" not in errors and "free space" not in errors, errors
        processes[victim].communicate()
    processes = start(text_file, directory, directory)
    wait(processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in finish(processes)] == [143] * 2
    assert workdir.list_steps(directory / workdir.CHECKPOINTS)[-1] < 280
    (end,) = finish([runs.start(runs.make_arguments(text_file, directory, "--config.mesh.data=8"))])
    assert end[0] == 0, end
    assert_close(directory, whole)
    assert {path.name for path in directory.iterdir()} >= {"samples.txt", "curves.png"}


def test_processes_with_different_working_directories_fail(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()  # As on a local disk where the directory exists.
    ends = finish(start(text_file, tmp_path / "0", tmp_path / "1"))
    assert all(code for code, _ in ends), ends
    errors = "".join(text for code, text in ends if code == 2)
    assert re.search("^error: .*same config, text or working directory", errors, re.M), ends
