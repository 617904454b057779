"""The one exception that stands for a user's mistake, and others told in one line."""


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one line that names what is wrong and what to do. Commands print it on standard
    error and exit with code 2; it never reaches a user as a traceback.
    """


class NotFiniteError(UserError):
    """Training came to numbers that are no longer finite."""


class UnavailableError(UserError):
    """The place where a run is kept can't be used now: it is full, not writable, or in use.

    Nothing is wrong with the run itself.
    """


def one_line(error: Exception) -> str:
    """The type and the message of an exception, its line breaks made spaces."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def visible(text: str) -> str:
    """Return a text in one line, with escapes for what would change how a terminal shows it."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(text.split())
    )
