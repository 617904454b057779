"""LSTM language models in JAX and Flax: train on a text, measure, and generate."""

import importlib
from typing import TYPE_CHECKING, Any

from lstm_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from lstm_jax import config
    from lstm_jax.cells.check import check_cell
    from lstm_jax.errors import UserError
    from lstm_jax.generation import Controls
    from lstm_jax.run.run import Run, load
    from lstm_jax.training import train

__all__ = ["Controls", "Run", "UserError", "check_cell", "config", "load", "train"]

# The modules of the public names. They are imported on first use, because importing JAX takes
# seconds.
_MODULES = {
    "Controls": "generation",
    "Run": "run.run",
    "UserError": "errors",
    "check_cell": "cells.check",
    "load": "run.run",
    "train": "training",
}

if not TYPE_CHECKING:  # With it, mypy would accept every name.

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"lstm_jax.{_MODULES.get(name, name)}")
        return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
