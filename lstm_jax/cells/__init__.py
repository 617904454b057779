"""Define recurrent cells: each computes one step, in plain equations; a scan runs it over time.

A cell is a flax module in its own file, here or anywhere; `cells.base` defines its methods.
docs/cells.md has a table of the cells here, with their numbers of parameters and their sources.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `config` lists the names, and does not import Flax.
    import flax.linen as nn

# The class of each cell, in the module of its name.
_CLASSES = {
    "lstm": "LSTMCell",
    "peephole": "PeepholeLSTMCell",
    "mogrifier": "MogrifierLSTMCell",
    "multiplicative": "MultiplicativeLSTMCell",
    "gru": "GRUCell",
    "rnn": "RNNCell",
    "minlstm": "MinLSTMCell",
    "mingru": "MinGRUCell",
    "rglru": "RGLRUCell",
    "paragru": "ParaGRUCell",
    "slstm": "SLSTMCell",
    "mlstm": "MLSTMCell",
}


class _Cells(Mapping[str, "type[nn.Module]"]):
    """The cells of the package by name; each is imported when it is looked up."""

    def __getitem__(self, name: str) -> "type[nn.Module]":
        class_name = _CLASSES[name]
        cell: type[nn.Module] = getattr(importlib.import_module(f"{__name__}.{name}"), class_name)
        return cell

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


CELLS = _Cells()
# Cells of files that a user has named, by FILE.py:CLASS, with the files' checksums, in the order in
# which they were loaded; see `run.cell_file`.
LOADED: dict[str, "tuple[type[nn.Module], str]"] = {}
