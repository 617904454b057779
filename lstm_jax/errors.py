"""The exception for a user's mistake, one-line messages, and the log of the package."""

import contextlib
import logging
import shlex
import sys
import traceback
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger("lstm_jax")


def make_command(module: str, *arguments: str) -> str:
    """Return a command of the package for this Python, to paste in the current directory."""
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return shlex.join([str(python), "-m", f"lstm_jax.{module}", *arguments])


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line that names the mistake and the remedy. A command prints it on standard
    error and exits with code 2, without a traceback.
    """


class NotFiniteError(UserError):
    """A parameter, a loss, a gradient or a prediction is not finite."""


class UnavailableError(UserError):
    """A directory can't be used now: its disk is full, or it is not writable or in use."""


def check_type(name: str, value: object, kind: type) -> None:
    """Raise `UserError` if the value of a setting is of another type; a bool is not a number."""
    wanted: Any = {int: Integral, float: Real}.get(kind, kind)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} is {value!r:.99}: it must be of type {kind.__name__}")


def one_line(error: BaseException) -> str:
    """Return the type and the message of an exception, with spaces for line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def make_visible(text: str) -> str:
    """Return a text on one line, with escapes for characters that could control a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def warn(message: str) -> None:
    """Log a warning on one line."""
    _LOGGER.warning("%s", make_visible(message))


def note(message: str) -> None:
    """Log what takes time, or what was written, on one line."""
    _LOGGER.info("%s", make_visible(message))


class _StandardError(logging.Handler):
    """Prints records on the current standard error, warnings as `warning: ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else "warning: "
        print(f"{prefix}{record.getMessage()}", file=sys.stderr)


def show_log() -> None:
    """Print what the package logs on standard error: commands do."""
    _LOGGER.handlers = [_StandardError()]
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False


@contextlib.contextmanager
def run_user_code(kind: str, file: str, *passed: type[Exception]) -> Iterator[None]:
    """Let code of a user's Python file import the modules of its directory.

    Raise any exception as a `UserError` that names file and line, and calls the file `kind`, except
    for those `passed`.
    """
    directory = str(Path(file).parent)
    sys.path.insert(0, directory)
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, *passed)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == file]
        raise UserError(f"{kind} {file}{(lines or [''])[-1]}: {one_line(error)}") from None
    finally:
        sys.path.remove(directory)


@contextlib.contextmanager
def name_failure(action: str) -> Iterator[None]:
    """Convert an `OSError` to a `UserError` that names the action, as in "can't read a.txt"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{action}: {error.strerror}") from None
