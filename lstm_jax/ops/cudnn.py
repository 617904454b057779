"""Run one LSTM layer over time with cuDNN, on a GPU, in float32."""

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from lstm_jax.cells.lstm import Kernels, LSTMCarry


def run_recurrence(
    kernels: Kernels, rows: jax.Array, carry: LSTMCarry
) -> tuple[jax.Array, LSTMCarry]:
    """Run one layer: [batch, time, features] → [batch, time, hidden], and the last carry."""
    batch, time, features = rows.shape
    outputs, hidden, cell = rnn.lstm(
        rows,
        carry.hidden[None],
        carry.cell[None],
        pack_weights(kernels),
        jnp.full(batch, time, jnp.int32),
        input_size=features,
        hidden_size=carry.hidden.shape[1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return outputs, LSTMCarry(cell[0], hidden[0])


def pack_weights(kernels: Kernels) -> jax.Array:
    """Pack the parameters in one array: transposed kernels, bias, and a second bias of zeros."""
    parts = (kernels.input.T, kernels.recurrent.T, kernels.bias, jnp.zeros_like(kernels.bias))
    return jnp.concatenate([part.reshape(-1) for part in parts])
