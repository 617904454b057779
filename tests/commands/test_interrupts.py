"""Test that Ctrl-C at any moment gives one line and exit code 130, never a traceback."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import commands
import draws
import runs
from lstm_jax.run import interrupts, signals

ROOT = Path(__file__).parents[2]
# The number of moments to try.
MOMENTS = 2 * draws.TIMES


@pytest.mark.process
@pytest.mark.parametrize("module", ["main", "sample", "evaluate", "sweep"])
@pytest.mark.drawn
def test_an_interrupted_command_prints_one_line(
    module: str, trained: Path, text_file: Path, tmp_path: Path
) -> None:
    experiment = ("--config", f"{ROOT}/experiments/quick.py", f"--config.data.path={text_file}")
    arguments = {
        "main": (*experiment, *runs.TINY, f"--workdir={tmp_path / 'run'}"),
        "sample": (f"--workdir={trained}", "--length=1000000"),
        "evaluate": (f"--workdir={trained}", "--split=train", "--dynamic"),
        "sweep": (*experiment, *runs.TINY, "--seeds=2", f"--workdir={tmp_path / 'sweep'}"),
    }[module]
    began = time.monotonic()
    commands.run_python("-c", "import lstm_jax.run.interrupts")
    python_seconds = 2 * (time.monotonic() - began)  # In which Python itself starts.
    for number in range(MOMENTS):
        # Divide the first four seconds into equal parts; the moment is random within one of them.
        share = number + random.Random(f"{draws.SEED} {module} {number}").random()
        moment = python_seconds + share / MOMENTS * 4
        process = subprocess.Popen(
            [sys.executable, "-m", f"lstm_jax.{module}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        time.sleep(moment)
        if process.poll() is not None:  # The command has already finished.
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            continue
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        message = f"{module} after {moment:.2f} s: {errors}"
        if process.returncode == 0:  # It had printed its result, and Python was shutting down.
            assert module == "evaluate" and output.endswith("}\n") and not errors, message
            continue
        assert process.returncode == 130, message
        # Training first saves, a sweep writes its results, and they print this on standard output.
        is_answered = "Stopped at step" in output or "All trials: " in output
        assert errors == ("" if is_answered else "Interrupted.\n"), message


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGINT, "Interrupted."), (signal.SIGTERM, "Terminated.")]
)
@pytest.mark.process
def test_a_signal_during_the_imports_prints_one_line(number: signal.Signals, message: str) -> None:
    code = (
        "import os; from lstm_jax.run import interrupts\n"
        f"interrupts.exit_at_once(); os.kill(os.getpid(), {number.value})"
    )
    process = commands.run_python("-c", code)
    assert (process.returncode, process.stderr) == (128 + number, f"{message}\n")


def test_a_stop_request_leaves_an_ignored_signal_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = signals.StopRequest()
        with interrupts.handle_signals(stop.handle_signal):
            os.kill(os.getpid(), signal.SIGINT)
        stop.check()  # Raises nothing.
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
