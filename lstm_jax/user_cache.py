"""Find the user's cache directory."""

import contextlib
import os
from pathlib import Path

from lstm_jax.errors import UserError


def get_path(name: str) -> Path:
    """Return the path lstm-jax/NAME below XDG_CACHE_HOME or ~/.cache.

    Raise `UserError` if there is neither.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        raise UserError("this user has no home directory: set XDG_CACHE_HOME")
    return Path(cache, "lstm-jax", name)


def make_directory(name: str) -> Path | None:
    """Make a directory in the user's cache, and return its path; None if it can't be written."""
    with contextlib.suppress(OSError, UserError):
        directory = get_path(name)
        directory.mkdir(0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    return None
