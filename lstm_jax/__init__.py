"""LSTM language models in JAX and Flax: train on a text, measure, and generate."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public functions, and the modules that they are imported from when they are first used.
_PUBLIC = {"check_cell": "lstm_jax.cells.check"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
