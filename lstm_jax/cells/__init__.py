"""Recurrent cells: each computes one step, in plain equations; a scan runs it over time.

A cell is a flax module in a file of its own, here or anywhere; `cells.protocol` defines it.

| cell      | parameters, with n inputs and h hidden units |
| --------- | -------------------------------------------- |
| lstm      | 4h (n + h + 1)                               |
| peephole  | 4h (n + h + 1) + 3h                          |
| mogrifier | 4h (n + h + 1) + rounds * n * h              |
| gru       | 3h (n + h + 1) + h                           |
| rnn       | h (n + h + 1)                                |
| minlstm   | 3h (n + 1)                                   |
| mingru    | 2h (n + 1)                                   |
| rglru     | h (n + 1) + 2h (h + 1) + h                   |
| slstm     | 4h (n + h / heads + 1)                       |
| mlstm     | 4h (n + 1) + 2 heads (n + 1)                 |

Layer normalization, which only the first five have, adds gates * h scales for the inputs, the same
number for the hidden state, and 2h parameters for the cell state of an LSTM. A residual block
(`cells.block`) adds 6h^2 + 7h, and n h if n is not h; its cell has h inputs.
"""

from collections.abc import Mapping
from types import MappingProxyType

import flax.linen as nn

from lstm_jax.cells.gru import GRUCell
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.cells.mingru import MinGRUCell
from lstm_jax.cells.minlstm import MinLSTMCell
from lstm_jax.cells.mlstm import MLSTMCell
from lstm_jax.cells.mogrifier import MogrifierLSTMCell
from lstm_jax.cells.peephole import PeepholeLSTMCell
from lstm_jax.cells.rglru import RGLRUCell
from lstm_jax.cells.rnn import RNNCell
from lstm_jax.cells.slstm import SLSTMCell
from lstm_jax.errors import UserError

# Read-only: a cell that a config file adds would be unknown to all other commands.
CELLS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "lstm": LSTMCell,
        "peephole": PeepholeLSTMCell,
        "mogrifier": MogrifierLSTMCell,
        "gru": GRUCell,
        "rnn": RNNCell,
        "minlstm": MinLSTMCell,
        "mingru": MinGRUCell,
        "rglru": RGLRUCell,
        "slstm": SLSTMCell,
        "mlstm": MLSTMCell,
    }
)
# The values of the config field `model.block`.
BLOCKS = ("none", "residual")
# Cells of files that a user has named, by FILE.py:CLASS; see `run.cell_file`.
_OWN: dict[str, type[nn.Module]] = {}


def add_cell(name: str, cell: type[nn.Module]) -> None:
    """Make a cell of a user's file available as FILE.py:CLASS."""
    _OWN[name] = cell


def find_cell(name: str) -> type[nn.Module]:
    """Return the cell FILE.py:CLASS; raise `UserError` if its file was not loaded."""
    if name not in _OWN:
        raise UserError(
            f"the cell {name} is in a file, whose code runs only if you name it: add --cell {name}"
        )
    return _OWN[name]
