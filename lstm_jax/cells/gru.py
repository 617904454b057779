"""The GRU cell."""

import flax.linen as nn
import jax.numpy as jnp

from lstm_jax.cells.base import Cell, Inputs, Outputs
from lstm_jax.ops.gates import GRUParams, HiddenCarry


class GRUCell(Cell):
    """One step of a gated recurrent unit (Cho et al. 2014) with the reset gate after the matmul.

        r = sigmoid(x Wr + h Ur + br)            reset gate
        z = sigmoid(x Wz + h Uz + bz)            update gate: how much of h is kept
        n = tanh(x Wn + bn + r * (h Un + un))    candidate; un is `recurrent_bias` [hidden_size]
        h' = (1 - z) * n + z * h

    cuDNN, PyTorch and Keras compute this variant.
    """

    layer_params = GRUParams  # Remove it if you change the equations: see `Cell`.

    def setup(self) -> None:
        self.declare_kernels(3)
        zeros = nn.initializers.zeros
        self.recurrent_bias = self.param("recurrent_bias", zeros, (self.hidden_size,))

    def __call__(self, carry: HiddenCarry, inputs: Inputs) -> tuple[HiddenCarry, Outputs]:
        xr, xz, xn = jnp.split(self.project_inputs(inputs), 3, axis=-1)
        hr, hz, hn = jnp.split(self.project_hidden(carry.hidden), 3, axis=-1)
        r, z = nn.sigmoid(xr + hr), nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + r * (hn + self.recurrent_bias[None]))
        hidden = (1 - z) * n + z * carry.hidden
        return HiddenCarry(hidden), hidden

    def activation(self, carry: HiddenCarry) -> Outputs:
        return carry.hidden
