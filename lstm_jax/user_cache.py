"""Find the user's cache directory."""

import os
from pathlib import Path


def make_directory(name: str) -> Path:
    """Make the directory lstm-jax/NAME in XDG_CACHE_HOME or ~/.cache, and return its path.

    Raise `OSError` if that fails.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(cache, "lstm-jax", name)
    directory.mkdir(0o700, parents=True, exist_ok=True)
    return directory
