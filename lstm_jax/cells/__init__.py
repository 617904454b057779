"""Define recurrent cells: each computes one step, in plain equations; a scan runs it over time.

A cell is a flax module in its own file, here or anywhere; `cells.protocol` defines its methods.
docs/cells.md has a table of the cells here, with their numbers of parameters and their sources.
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
from lstm_jax.cells.multiplicative import MultiplicativeLSTMCell
from lstm_jax.cells.paragru import ParaGRUCell
from lstm_jax.cells.peephole import PeepholeLSTMCell
from lstm_jax.cells.rglru import RGLRUCell
from lstm_jax.cells.rnn import RNNCell
from lstm_jax.cells.slstm import SLSTMCell

# Read-only: a cell that a config file adds would be unknown to all other commands.
CELLS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "lstm": LSTMCell,
        "peephole": PeepholeLSTMCell,
        "mogrifier": MogrifierLSTMCell,
        "multiplicative": MultiplicativeLSTMCell,
        "gru": GRUCell,
        "rnn": RNNCell,
        "minlstm": MinLSTMCell,
        "mingru": MinGRUCell,
        "rglru": RGLRUCell,
        "paragru": ParaGRUCell,
        "slstm": SLSTMCell,
        "mlstm": MLSTMCell,
    }
)
# Cells of files that a user has named, by FILE.py:CLASS, with the files' checksums, in the order in
# which they were loaded; see `run.cell_file`.
LOADED: dict[str, tuple[type[nn.Module], str]] = {}
