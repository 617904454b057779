"""Run an LSTM layer over time with cuDNN, on a GPU, in float32."""

import jax.numpy as jnp
from jax.experimental import rnn
from jaxtyping import Array, Float

from lstm_jax.ops.gates import LSTMCarry, LSTMParams
from lstm_jax.ops.scan import Layer


def run(layer: Layer) -> tuple[LSTMCarry, Float[Array, "time batch hidden"]]:
    """Return the last carry and the outputs."""
    time, batch, features = layer.inputs.shape
    lengths = jnp.full(batch, time, jnp.int32)
    if layer.marks.frozen is not None:
        lengths = (~layer.marks.frozen).sum(axis=0, dtype=jnp.int32)
    outputs, hidden, cell = rnn.lstm(
        layer.inputs.swapaxes(0, 1),
        layer.carry.hidden[None],
        layer.carry.cell[None],
        pack_weights(layer.params),
        lengths,
        input_size=features,
        hidden_size=layer.carry.hidden.shape[1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return LSTMCarry(cell[0], hidden[0]), outputs.swapaxes(0, 1)


def pack_weights(params: LSTMParams) -> Float[Array, " n"]:
    """Pack the parameters in one array: transposed kernels, bias, and a second bias of zeros."""
    kernels = params.input_kernel.T, params.recurrent_kernel.T
    parts = (*kernels, params.bias, jnp.zeros_like(params.bias))
    return jnp.concatenate([part.reshape(-1) for part in parts])
