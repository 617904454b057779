"""Find the user's cache directory."""

import contextlib
import os
from pathlib import Path


def get_path(name: str) -> Path:
    """Return the path lstm-jax/NAME below XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "lstm-jax", name)


def make_directory(name: str) -> Path | None:
    """Make a directory in the user's cache, and return its path; None if it can't be written."""
    with contextlib.suppress(OSError):
        directory = get_path(name)
        directory.mkdir(0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    return None
