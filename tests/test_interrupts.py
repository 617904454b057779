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
from lstm_jax.run import signals

ROOT = Path(__file__).parents[1]
# The number of moments to try.
MOMENTS = 2 * draws.TIMES
# The time in which Python itself starts, before this package runs.
PYTHON_SECONDS = 0.15


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
    for number in range(MOMENTS):
        # Divide the first four seconds into equal parts; the moment is random within one of them.
        share = number + random.Random(f"{draws.SEED} {module} {number}").random()
        moment = PYTHON_SECONDS + share / MOMENTS * 4
        process = subprocess.Popen(
            [sys.executable, "-m", f"lstm_jax.{module}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        time.sleep(moment)
        if process.poll() is not None:  # The command has already finished.
            process.communicate()
            continue
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        message = f"{module} after {moment:.2f} s: {errors}"
        if process.returncode == 0:  # It had printed its result, and Python was shutting down.
            assert module == "evaluate" and output.endswith("}\n") and not errors, message
            continue
        assert process.returncode == 130, message
        # Training first saves, and prints this on standard output.
        assert errors == ("" if "Stopped at step" in output else "Interrupted.\n"), message


SWALLOWED = """
import time
from lstm_jax.run import interrupts
interrupts.exit_at_once()
from lstm_jax.run import command
def main():
    print("ready", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        {caught}
    time.sleep(60)
command.run_command(main)
"""


@pytest.mark.process
@pytest.mark.parametrize("caught", ["pass", "raise SystemError('lost on its way')"])
def test_a_swallowed_interrupt_is_raised_again(caught: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWED.format(caught=caught)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "Interrupted.\n"


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


@pytest.mark.process
def test_an_interrupt_in_an_import_of_a_command_is_not_raised_there(tmp_path: Path) -> None:
    # An extension module can't be imported again.
    library = tmp_path / "library.py"
    library.write_text("import os\ntry: os.kill(os.getpid(), 2)\nexcept BaseException: os.abort()")
    code = (
        "from lstm_jax.run import interrupts; interrupts.exit_at_once()\n"
        "interrupts.raise_from_here(); import library"
    )
    process = commands.run_python("-c", code, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert (process.returncode, process.stderr) == (130, "Interrupted.\n")


def test_a_stop_request_leaves_an_ignored_signal_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
