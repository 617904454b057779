"""The exception for a user's mistake, and one-line messages."""

import contextlib
import sys
import traceback
from collections.abc import Iterator


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line that names the mistake and the remedy. A command prints it on standard
    error and exits with code 2, without a traceback.
    """


class NotFiniteError(UserError):
    """A parameter, the loss or a gradient is not finite."""


class UnavailableError(UserError):
    """A working directory can't be used now: its disk is full, or it is not writable or in use.

    Nothing is wrong with the run itself.
    """


def one_line(error: BaseException) -> str:
    """Return the type and the message of an exception, with spaces for line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def blaming_file(
    kind: str, file: str, passing: type[Exception] | tuple[type[Exception], ...] = UserError
) -> Iterator[None]:
    """Convert any exception of a user's Python file to a `UserError` that names file and line.

    `kind` is what the message calls the file. Exceptions of the types `passing` are not converted,
    nor those of signal handlers.
    """
    try:
        yield
    except passing:
        raise
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{kind} {error.filename or file}{line}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:
            raise  # A signal handler raised it.
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == file]
        line = f"line {(own or frames)[-1].lineno}"
        raise UserError(f"{kind} {file}, {line}: {one_line(error)}") from None


def visible(text: str) -> str:
    """Return a text on one line, with escapes for characters that could control a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(text.split())
    )


def warn(message: str) -> None:
    """Print a warning on one line of standard error."""
    print("warning:", visible(message), file=sys.stderr)
