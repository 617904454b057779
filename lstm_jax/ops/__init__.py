"""Recurrent layers as pure functions of arrays, for any model: `from lstm_jax import ops`.

    carry, outputs = ops.lstm(ops.LSTMParams.init(key, features=64, hidden=256), inputs)

`lstm` (`api.py`) documents the arguments. `gates.py` has the equations of the gated
layers and their derivatives. docs/layers.md has examples and measurements.
"""

from lstm_jax.ops.api import Options, gru, lstm, peephole_lstm, rnn, run, step
from lstm_jax.ops.gates import (
    GRUParams,
    HiddenCarry,
    LSTMCarry,
    LSTMParams,
    PeepholeLSTMParams,
    RNNParams,
)
from lstm_jax.ops.linear import linear_scan
from lstm_jax.ops.matrix_lstm import MLSTMCarry, MLSTMParams, mlstm
from lstm_jax.ops.steps import PreparedLayer, prepare

__all__ = [
    "GRUParams",
    "HiddenCarry",
    "LSTMCarry",
    "LSTMParams",
    "MLSTMCarry",
    "MLSTMParams",
    "Options",
    "PeepholeLSTMParams",
    "PreparedLayer",
    "RNNParams",
    "gru",
    "linear_scan",
    "lstm",
    "mlstm",
    "peephole_lstm",
    "prepare",
    "rnn",
    "run",
    "step",
]
