"""Run a command of the package in this process: its flags, output and exit code."""

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from absl import flags
from absl import logging as absl_logging

from lstm_jax import cells
from lstm_jax.run import interrupts

ROOT = Path(__file__).parents[1]


def run(
    program: str, *arguments: object, cwd: Path | None = None, stdin: str | bytes = ""
) -> subprocess.CompletedProcess[str]:
    """Run `python -m lstm_jax.PROGRAM ARGUMENTS...` here, or a file of the clone, as in a process.

    The modules that it imports stay imported, and what it compiles stays compiled. What belongs to
    a process (signals, descriptors, the end of other threads) needs a process.
    """
    content = stdin.encode() if isinstance(stdin, str) else stdin
    stdout, stderr = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    )
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(keep_process_state())
        stack.enter_context(warnings.catch_warnings())
        patch.chdir(cwd or Path.cwd())
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(interrupts, "exit_now", sys.exit)
        warnings.filterwarnings("ignore", ".*found in sys.modules")  # By runpy.
        code: Any = 0
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(f"lstm_jax.{program}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    texts = (stream.buffer.getvalue().decode() for stream in (stdout, stderr))
    output, errors = (text.replace("\r\n", "\n") for text in texts)
    return subprocess.CompletedProcess([program, *map(str, arguments)], code, output, errors)


def get_output(program: str, *arguments: object, **options: Any) -> str:
    """Run a command that must succeed, as `run` does, and return its standard output."""
    result = run(program, *arguments, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_python(
    *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with these variables added to the environment."""
    command, environment = [sys.executable, *map(str, arguments)], {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: int = 60
) -> None:
    """Wait until a condition is true; fail if the process ends before, or after a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def keep_process_state() -> Any:
    """Restore what a command sets for its whole process: flags, loaded cells, signals, hooks."""
    known, loaded = set(flags.FLAGS), dict(cells.LOADED)
    cells.LOADED.clear()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    handlers = {number: signal.getsignal(number) for number in numbers}
    verbosity, hook = absl_logging.get_verbosity(), sys.unraisablehook
    log_handlers = logging.root.handlers[:]  # Absl adds one.
    try:
        yield
    finally:
        # A library defines its flags once, when it is imported; a command, which is a file, again.
        for name in set(flags.FLAGS) - known:
            module = flags.FLAGS.find_module_defining_flag(name)
            if module.endswith(".py") or name.startswith("config."):
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        cells.LOADED.clear()
        cells.LOADED.update(loaded)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        absl_logging.set_verbosity(verbosity)
        logging.root.handlers[:] = log_handlers
        sys.unraisablehook = hook
