"""Recurrent layers as pure functions of arrays, for any model: `from lstm_jax import ops`.

    carry, outputs = ops.lstm(ops.LSTMParams.init(key, features=64, hidden=256), inputs)

`lstm` (`api.py`) documents the arguments. `gates.py` has the equations of the gated
layers and their derivatives. docs/layers.md has examples and measurements.
"""

from lstm_jax.ops.api import (
    Options,
    PreparedLayer,
    gru,
    lstm,
    peephole_lstm,
    prepare,
    rnn,
    run,
    step,
)
from lstm_jax.ops.gates import (
    GRUParams,
    HiddenCarry,
    LSTMCarry,
    LSTMParams,
    PeepholeLSTMParams,
    RNNParams,
)
from lstm_jax.ops.scans import MLSTMCarry, MLSTMParams, linear_scan, mlstm

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
