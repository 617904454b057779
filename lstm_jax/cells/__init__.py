"""Recurrent cells: each computes one step, in plain equations; a scan runs it over time.

Every cell is a flax module with the same interface:

- `cell(carry, inputs)` returns the next carry and the outputs [batch, hidden_size];
- `cell.initial_carry(batch_size)` returns the carry at the start of a text, zeros;
- `cell.gates(carry, inputs)` and `cell.activation(carry)` return the gates and the activations of a
  step, for `lstm_jax.inspect`.

| cell      | gates      | parameters, with n inputs and h hidden units |
| --------- | ---------- | -------------------------------------------- |
| lstm      | i, f, g, o | 4h (n + h + 1)                               |
| mogrifier | i, f, g, o | 4h (n + h + 1) + rounds * n * h              |
| gru       | r, z, n    | 3h (n + h + 1) + h                           |
| rnn       | the output | h (n + h + 1)                                |

Layer normalization adds gates * h scales for the inputs, the same number for the hidden state, and
2h parameters for the cell state of an LSTM.
"""

from types import MappingProxyType

from lstm_jax.cells.gru import GRUCell
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.cells.mogrifier import MogrifierLSTMCell
from lstm_jax.cells.rnn import RNNCell

# Read-only: a cell that a config file adds would be unknown to all other commands.
CELLS = MappingProxyType(
    {"lstm": LSTMCell, "mogrifier": MogrifierLSTMCell, "gru": GRUCell, "rnn": RNNCell}
)
