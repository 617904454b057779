"""Test training processes that are killed, stopped, concurrent, or on a full disk."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import draws
import runs
from disks import fill, mounted
from lstm_jax.run import checkpoints, metrics, workdir

pytestmark = pytest.mark.process


ROOT = Path(__file__).parents[1]
# The number of runs to kill.
KILLS = 2 * draws.TIMES
# A compilation cache that all processes share.
_COMPILED = tempfile.TemporaryDirectory()
ENV = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def command(text_file: Path, directory: Path, *more: str) -> list[str]:
    """Return a command that trains for 4 epochs of 70 steps and saves as often as possible."""
    return [
        *(sys.executable, "-m", "lstm_jax.main", "--config", f"{ROOT}/experiments/quick.py"),
        *(f"--workdir={directory}", f"--config.data.path={text_file}"),
        *("--config.batches.batch_size=8", "--config.batches.window_length=32"),
        *("--config.model.embedding_size=8", "--config.model.hidden_size=24"),
        "--config.model.dtype=float32",
        *("--config.num_epochs=4", "--config.sample.length=40"),
        *("--config.checkpoint_every_seconds=0", *more),
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENV
    )


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=200, cwd=ROOT, env=ENV)


def wait_for_rows(process: subprocess.Popen[str], directory: Path, number: int) -> None:
    """Wait until the run has written `number` lines of metrics."""
    deadline = time.monotonic() + 100
    while len(metrics.read_metrics(directory / workdir.METRICS)) < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the directory of an uninterrupted run, and its duration in seconds."""
    for name in ("compiling", "whole"):  # The runs that are killed find everything compiled.
        directory = tmp_path_factory.mktemp(name)
        began = time.monotonic()
        result = finish(command(text_file, directory))
        assert result.returncode == 0, result.stderr
    return directory, time.monotonic() - began


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.drawn
def test_a_run_killed_at_any_moment_ends_with_the_same_result(
    number: int, whole: tuple[Path, float], text_file: Path, tmp_path: Path
) -> None:
    expected, seconds = whole
    # Divide the run into KILLS equal parts; the moment is random within one of them.
    moment = seconds * (number + random.Random(f"{draws.SEED} {number}").random()) / KILLS
    arguments = command(text_file, tmp_path / "run")
    process = start(arguments)
    time.sleep(moment)
    process.kill()
    process.communicate()
    result = finish(arguments)
    assert result.returncode == 0, f"killed after {moment} s: {result.stderr}"
    assert result.stderr == ""
    runs.assert_same(expected, tmp_path / "run")


def test_sigterm_stops_within_seconds_in_training_and_in_validation(
    whole: tuple[Path, float], text_file: Path, tmp_path: Path
) -> None:
    # The validation takes about a minute.
    text = text_file.read_text(encoding="utf-8")
    long = tmp_path / "long.txt"
    long.write_text(text * 50, encoding="utf-8")
    directory = tmp_path / "run"
    arguments = command(
        long,
        directory,
        "--config.data.fractions=0.01,0.98,0.01",
        "--config.batches.batch_size=64",
        "--config.model.hidden_size=256",
    )
    process = start(arguments)
    deadline = time.monotonic() + 100
    while checkpoints.list_steps(directory / workdir.CHECKPOINTS) != [0]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # Schedulers may send it more than once.
    sent = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == 128 + signal.SIGTERM and errors == ""
    assert "Stopped at step 0 of" in output
    assert metrics.read_metrics(directory / workdir.METRICS) == [], "it was in the first validation"

    directory = tmp_path / "training"
    arguments = command(text_file, directory)
    process = start(arguments)
    wait_for_rows(process, directory, 5)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == 128 + signal.SIGTERM and errors == ""
    assert finish(arguments).returncode == 0
    runs.assert_same(whole[0], directory)


def test_a_second_process_fails_and_reading_works(text_file: Path, tmp_path: Path) -> None:
    arguments = command(text_file, tmp_path, "--config.num_epochs=10000")
    first = start(arguments)
    wait_for_rows(first, tmp_path, 3)
    second = finish(arguments)
    assert second.returncode == 2 and second.stdout == ""
    assert f"process {first.pid} on " in second.stderr and len(second.stderr.splitlines()) == 1
    sampled = finish(
        [sys.executable, "-m", "lstm_jax.sample", f"--workdir={tmp_path}", "--length=9"]
    )
    assert sampled.returncode == 0 and sampled.stderr == "" and len(sampled.stdout) == 10
    assert first.poll() is None, "it still runs"
    first.kill()
    first.communicate()


def test_a_full_disk_stops_the_run_and_keeps_its_checkpoints(
    whole: tuple[Path, float], text_file: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "-o", "size=8m") as disk:
        directory = disk / "run"
        arguments = command(text_file, directory)
        process = start(arguments)
        wait_for_rows(process, directory, 12)
        filler = fill(disk)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2, output
        assert "No space left" in errors and len(errors.splitlines()) == 1
        kept = checkpoints.list_steps(directory / workdir.CHECKPOINTS)
        assert kept and all(
            checkpoints.find_damage(directory / workdir.CHECKPOINTS / str(step)) is None
            for step in kept
        )
        # The disk is still full, including the space that the run has freed: the same error, and
        # nothing is lost.
        fill(disk)
        again = finish(arguments)
        assert again.returncode == 2 and "No space left" in again.stderr
        assert len(again.stderr.splitlines()) == 1
        assert checkpoints.list_steps(directory / workdir.CHECKPOINTS) == kept
        filler.unlink()
        assert finish(arguments).returncode == 0
        runs.assert_same(whole[0], directory)


def test_on_a_read_only_disk_training_fails_and_reading_works(
    trained: Path, text_file: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk") as disk:
        shutil.copytree(trained, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = finish(command(text_file, disk / "run"))
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert f"can't write to {disk / 'run'}: Read-only file system" in result.stderr
        sample = [sys.executable, "-m", "lstm_jax.sample", f"--workdir={disk / 'run'}"]
        assert finish(sample).returncode == 0


def test_reading_a_working_directory_runs_no_code_from_it(trained: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from lstm_jax.run import workdir
def audit(event, arguments):
    if event == "pickle.find_class" or "{tmp_path}" in str(arguments[:1]) and event in (
        "exec", "import", "ctypes.dlopen", "marshal.loads", "subprocess.Popen", "os.system"
    ):
        raise SystemExit(f"surprise: {{event}} {{arguments}}")
sys.addaudithook(audit)
print(workdir.load_trained(Path("{tmp_path}/run")).step)
"""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "sitecustomize.py").write_text("raise SystemExit('ran')")
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path / "run",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0 and result.stdout == "140\n", result.stderr
