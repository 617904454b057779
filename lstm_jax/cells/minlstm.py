"""The minLSTM cell."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lstm_jax.cells.base import Gates
from lstm_jax.cells.linear import Coefficients, LinearCell
from lstm_jax.cells.mingru import make_positive
from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import HiddenCarry


class MinLSTMCell(LinearCell):
    """One step of a minLSTM (Feng et al. 2024): an LSTM whose gates see the input only.

        f = sigmoid(x Wf + bf)          forget gate
        i = sigmoid(x Wi + bi)          input gate
        n = g(x Wn + bn)                candidate, with g(x) = x + 1/2 for x >= 0, else sigmoid(x)
        h' = f / (f + i) * h + i / (f + i) * n

    The two weights of a step add up to 1, so that the scale of h does not grow with time.
    """

    def setup(self) -> None:
        """Declare the parameters; f, i, n are side by side."""
        shape = (self.input_size, 3 * self.hidden_size)
        self.input_kernel = self.param("input_kernel", nn.initializers.glorot_uniform(), shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape[1:])

    def coefficients(self, inputs: Float[Array, "*batch inputs"]) -> Coefficients:
        """Return f / (f + i) and i / (f + i) * n of one or all steps."""
        gates = self.gates(None, inputs)
        return gates["forget"], gates["input"] * gates["candidate"]

    def gates(self, carry: HiddenCarry | None, inputs: Float[Array, "*batch inputs"]) -> Gates:
        """Return the gates of one or all steps, with forget and input gate divided by their sum."""
        sums = matmul(inputs, self.input_kernel, self.dtype, self.bias)
        f, i, n = jnp.split(sums, 3, axis=-1)
        # f / (f + i) is a sigmoid itself, of log f - log i, and so never 0 / 0.
        ratio = nn.log_sigmoid(f) - nn.log_sigmoid(i)
        f, i, n = nn.sigmoid(ratio), nn.sigmoid(-ratio), make_positive(n)
        return {"forget": f, "input": i, "candidate": n}
