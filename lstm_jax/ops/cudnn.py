"""Run an LSTM layer over time with cuDNN, on a GPU, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from lstm_jax.ops.gates import Gating, LSTMCarry, LSTMParams
from lstm_jax.ops.scan import Marks


def run(
    gating: Gating, params: Any, inputs: jax.Array, carry: Any, marks: Marks, dtype: str
) -> tuple[Any, jax.Array]:
    """Run a layer: inputs [time, batch, features] → last carry, outputs [time, batch, hidden]."""
    time, batch, features = inputs.shape
    lengths = jnp.full(batch, time, jnp.int32)
    if marks.frozen is not None:
        lengths = (~marks.frozen).sum(axis=0, dtype=jnp.int32)
    outputs, hidden, cell = rnn.lstm(
        inputs.swapaxes(0, 1),
        carry.hidden[None],
        carry.cell[None],
        pack_weights(params),
        lengths,
        input_size=features,
        hidden_size=carry.hidden.shape[1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return LSTMCarry(cell[0], hidden[0]), outputs.swapaxes(0, 1)


def pack_weights(params: LSTMParams) -> jax.Array:
    """Pack the parameters in one array: transposed kernels, bias, and a second bias of zeros."""
    kernels = params.input_kernel.T, params.recurrent_kernel.T
    parts = (*kernels, params.bias, jnp.zeros_like(params.bias))
    return jnp.concatenate([part.reshape(-1) for part in parts])
