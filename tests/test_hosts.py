"""Train in several processes on this machine, which communicate by gloo as hosts do."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
import test_interruption
from lstm_jax.devices import hosts
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, workdir

# Four processes at once, and one that hangs, take minutes on two cores.
SLOW = os.environ.get("LSTM_JAX_HOSTS") == "all"


FOUR = pytest.param(4, 4, marks=pytest.mark.skipif(not SLOW, reason="LSTM_JAX_HOSTS=all runs it"))


def free_address() -> str:
    """Return an address at which no process listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(
    text_file: Path, directory: Path, processes: int, *more: str
) -> list[subprocess.Popen[str]]:
    """Start all processes of a run."""
    address = free_address()
    arguments = test_interruption.command(text_file, directory, f"--config.mesh.data={processes}")
    joined = [f"--coordinator_address={address}", f"--num_processes={processes}", *more]
    return [
        test_interruption.start([*arguments, *joined, f"--process_id={k}"])
        for k in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for all of them; return their exit codes and standard error."""
    return [(p.returncode, errors) for p in processes for _, errors in [p.communicate(timeout=150)]]


def finish_well(processes: list[subprocess.Popen[str]]) -> None:
    assert finish(processes) == [(0, "")] * len(processes)


def assert_refused(processes: list[subprocess.Popen[str]], message: str) -> None:
    """Check that each prints the reason in one line, or that another process has ended."""
    ends = finish(processes)
    assert any(code == 2 and message in errors for code, errors in ends), ends
    for code, errors in ends:
        assert code and len(errors.splitlines()) == 1, ends
        assert message in errors or "another process of this run has ended" in errors, ends


def assert_close(one: Path, other: Path) -> None:
    """Check that two runs have the same losses to 1e-5 and the same parameters to 5e-5.

    Devices sum in another order, and 280 steps multiply the difference.
    """
    for (*a, loss), (*b, other_loss) in zip(runs.losses(one), runs.losses(other), strict=True):
        assert a == b and abs(loss - other_loss) < 1e-5
    *arrays, position = runs.final_state(one)
    *others, other_position = runs.final_state(other)
    assert position == other_position
    parameters = len(jax.tree.leaves(workdir.load_trained(one).params))
    for k, (a, b) in enumerate(zip(arrays, others, strict=True)):
        # The carry and the optimizer's moments have other sizes than 1.
        np.testing.assert_allclose(a, b, atol=5e-5 if k < parameters else 1e-3)


@pytest.fixture(scope="module")
def alone(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one process with one device."""
    directory = tmp_path_factory.mktemp("alone")
    arguments = test_interruption.command(text_file, directory, "--config.mesh.data=1")
    result = test_interruption.finish(arguments)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.parametrize(("count", "devices"), [(2, 4), FOUR])
def test_many_processes_train_like_one(
    count: int, devices: int, alone: Path, text_file: Path, tmp_path: Path
) -> None:
    processes = start(text_file, tmp_path / "run", count, f"--config.mesh.data={devices}")
    finish_well(processes)
    assert_close(tmp_path / "run", alone)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"samples.txt", "curves.png"}


def test_a_run_resumes_with_another_number_of_processes(
    alone: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two, which divide the parameters, then one, then two; each stopped by a signal to one."""
    directory = tmp_path / "run"
    divided = ("--config.mesh.data=1", "--config.mesh.model=2")
    processes = start(text_file, directory, 2, *divided)
    test_interruption.wait_for_rows(processes[0], directory, 5)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [(143, "")] * 2
    arguments = test_interruption.command(text_file, directory, "--config.mesh.data=1")
    process = test_interruption.start(arguments)
    rows = len(runs.losses(directory))
    test_interruption.wait_for_rows(process, directory, rows + 2)
    process.send_signal(signal.SIGINT)
    assert finish([process]) == [(130, "")]
    assert checkpoints.list_steps(directory / workdir.CHECKPOINTS)[-1] < 280
    finish_well(start(text_file, directory, 2, *divided))
    assert_close(directory, alone)


def test_a_run_resumes_from_one_device_on_eight_and_back(
    alone: Path, text_file: Path, tmp_path: Path
) -> None:
    """A signal stops each of the first two in the middle of an epoch."""
    directory = tmp_path / "run"
    for mesh, code in (("1,1", 143), ("4,2", 143), ("1,1", 0)):
        data, model = mesh.split(",")
        arguments = (f"--config.mesh.data={data}", f"--config.mesh.model={model}")
        process = test_interruption.start(
            test_interruption.command(text_file, directory, *arguments)
        )
        if code:
            rows = len(runs.losses(directory)) if directory.exists() else 0
            test_interruption.wait_for_rows(process, directory, rows + 3)
            process.send_signal(signal.SIGTERM)
        assert finish([process]) == [(code, "")]
    assert_close(directory, alone)


def test_a_lost_process_ends_the_others_and_the_same_command_resumes(
    alone: Path, text_file: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    for victim, other in ((1, 0), (0, 1)):
        processes = start(text_file, directory, 2)
        rows = len(runs.losses(directory)) if directory.exists() else 0
        test_interruption.wait_for_rows(processes[0], directory, rows + 3)
        processes[victim].kill()
        began = time.monotonic()
        _, errors = processes[other].communicate(timeout=60)
        assert time.monotonic() - began < 60 and processes[other].returncode != 0
        assert len(errors.splitlines()) == 1 and "another process of this run" in errors
        processes[victim].communicate()
    finish_well(start(text_file, directory, 2))
    assert_close(directory, alone)


_MEAN = """
import sys
import jax, numpy as np
from lstm_jax import config
from lstm_jax.devices import hosts, parallel

address, process = sys.argv[1], int(sys.argv[2])
settings = config.default()
settings.mesh.data, settings.mesh.model = 1, 2
with hosts.join_processes(address, 2, process, 60):
    parallel.use_cores(settings)
    mesh = parallel.make_mesh(settings)
    shape, spec = (1024, 4096), parallel.PartitionSpec(None, parallel.MODEL)
    mean = jax.jit(parallel.shard_map(
        lambda x: parallel.mean_over_devices({"kernel": x[0]}, {"kernel": spec}),
        mesh=mesh, in_specs=parallel.DIVIDED, out_specs={"kernel": spec},
    ))
    own = slice(2048 * process, 2048 * (process + 1))
    for seed in range(10):
        both = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
        found = mean(parallel.place_local(both[[process]], mesh, parallel.DIVIDED))["kernel"]
        found = found.addressable_data(0)
        np.testing.assert_allclose(found, both.mean(axis=0)[:, own], atol=1e-5)
"""


def test_the_mean_of_large_gradients_over_processes_is_correct() -> None:
    """Gloo's reduce-scatter sometimes fails for arrays like the seed model's recurrent kernel.

    Each process has a second device, which takes no part. If it is behind at the end, the processes
    must wait for it. Neither happens every time.
    """
    for _ in range(4):
        address = free_address()
        processes = [
            test_interruption.start([sys.executable, "-c", _MEAN, address, str(k)])
            for k in range(2)
        ]
        finish_well(processes)


@pytest.mark.skipif(not SLOW, reason="it takes as long as a heartbeat may be late")
def test_a_process_that_hangs_ends_the_others(text_file: Path, tmp_path: Path) -> None:
    processes = start(text_file, tmp_path, 2, "--config.num_epochs=10000")
    test_interruption.wait_for_rows(processes[0], tmp_path, 3)
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, errors = processes[0].communicate(timeout=90)
    assert time.monotonic() - began < 60 and processes[0].returncode != 0
    assert len(errors.splitlines()) == 1 and "another process of this run" in errors
    processes[1].kill()
    processes[1].communicate()


def test_processes_with_different_working_directories_fail(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()  # As on a local disk, with a directory of that name.
    address = free_address()
    joined = ["--config.mesh.data=2", f"--coordinator_address={address}", "--num_processes=2"]
    processes = [
        test_interruption.start(
            [
                *test_interruption.command(text_file, tmp_path / str(k), *joined),
                f"--process_id={k}",
            ]
        )
        for k in range(2)
    ]
    assert_refused(processes, "same config, text and working directory")


def test_processes_that_do_not_fit_the_mesh_fail(text_file: Path, tmp_path: Path) -> None:
    processes = start(text_file, tmp_path / "run", 2, "--config.mesh.data=1")
    assert_refused(processes, "choose a multiple of the number of processes")
    assert not (tmp_path / "run").exists()
    arguments = test_interruption.command(text_file, tmp_path / "run")
    unreachable = "--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1"
    result = test_interruption.finish([*arguments, *unreachable, "--join_seconds=2"])
    assert result.returncode != 0 and len(result.stderr.splitlines()) == 1
    assert "can't be reached" in result.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost", 2, 0), "must be HOST:PORT"),
        (("localhost:1", 0, 0), "num_processes is 0: it must be 1 or more"),
        (("localhost:1", 2, 2), "process_id is 2: it must be from 0 .*, 1"),
        ((None, 2, 0), "belong together"),
        (("localhost:1", 2, None), "belong together"),
    ],
)
def test_invalid_process_flags_raise_an_error(
    given: tuple[str | None, int | None, int | None], message: str
) -> None:
    with pytest.raises(UserError, match=message), hosts.join_processes(*given, timeout_seconds=1):
        pass


def test_one_process_needs_no_others() -> None:
    with hosts.join_processes(None, None, None, 1):
        assert hosts.is_first() and hosts.get_greatest(3) == 3 and hosts.get_greatest(4) == 4
