"""Define recurrent cells: each computes one step, in plain equations; a scan runs it over time.

A cell is a flax module in its own file, here or anywhere; `cells.base` defines its methods.
docs/cells.md has a table of the cells here, with their numbers of parameters and their sources.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `config` lists the names, and does not import Flax.
    import flax.linen as nn

# The class of each cell, in the module of its name.
CELLS = {
    "lstm": "LSTMCell",
    "peephole": "PeepholeLSTMCell",
    "mogrifier": "MogrifierLSTMCell",
    "multiplicative": "MultiplicativeLSTMCell",
    "gru": "GRUCell",
    "rnn": "RNNCell",
    "minlstm": "MinLSTMCell",
    "mingru": "MinGRUCell",
    "rglru": "RGLRUCell",
    "slstm": "SLSTMCell",
    "mlstm": "MLSTMCell",
}


def import_cell(name: str) -> "type[nn.Module]":
    """Return the class of a cell of the package."""
    cell: type[nn.Module] = getattr(importlib.import_module(f"{__name__}.{name}"), CELLS[name])
    return cell


# Cells of files that a user has named, by FILE.py:CLASS, in the order in which they were loaded
# (`run.cell_file`).
LOADED: dict[str, "type[nn.Module]"] = {}
