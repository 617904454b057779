"""The exception for a user's mistake, and one-line messages."""

import sys


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


def visible(text: str) -> str:
    """Return a text on one line, with escapes for characters that could control a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def warn(message: str) -> None:
    """Print a warning on one line of standard error."""
    print("warning:", visible(message), file=sys.stderr)
