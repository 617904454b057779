"""LSTM language models in JAX and Flax: train on a text, measure, and generate."""

import importlib
from typing import Any

__version__ = "0.1.0"

# The public names of the package, by the module that defines them. They are imported on first use,
# because importing JAX takes seconds.
_PUBLIC = {
    "load": "run.library",
    "check_cell": "cells.check",
    "Controls": "controls",
    "UserError": "errors",
}
_MODULES = ("config", "train")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lstm_jax.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lstm_jax.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC, *_MODULES]
