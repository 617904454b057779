"""Recurrent layers as pure functions of arrays, for any model: `from lstm_jax import ops`.

    carry, outputs = ops.lstm(ops.LSTMParams.init(key, features=64, hidden=256), inputs)

`lstm` (`api.py`) documents the arguments. `gates.py` has the equations of the gated
layers and their derivatives. docs/layers.md has examples and measurements.
"""

from lstm_jax.ops.api import Options as Options
from lstm_jax.ops.api import PreparedLayer as PreparedLayer
from lstm_jax.ops.api import gru as gru
from lstm_jax.ops.api import lstm as lstm
from lstm_jax.ops.api import peephole_lstm as peephole_lstm
from lstm_jax.ops.api import prepare as prepare
from lstm_jax.ops.api import rnn as rnn
from lstm_jax.ops.api import run as run
from lstm_jax.ops.api import step as step
from lstm_jax.ops.gates import GRUParams as GRUParams
from lstm_jax.ops.gates import HiddenCarry as HiddenCarry
from lstm_jax.ops.gates import LSTMCarry as LSTMCarry
from lstm_jax.ops.gates import LSTMParams as LSTMParams
from lstm_jax.ops.gates import PeepholeLSTMParams as PeepholeLSTMParams
from lstm_jax.ops.gates import RNNParams as RNNParams
from lstm_jax.ops.scans import MLSTMCarry as MLSTMCarry
from lstm_jax.ops.scans import MLSTMParams as MLSTMParams
from lstm_jax.ops.scans import linear_scan as linear_scan
from lstm_jax.ops.scans import mlstm as mlstm
