"""The minGRU cell."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lstm_jax.cells.base import Gates
from lstm_jax.cells.linear import Coefficients, LinearCell
from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import HiddenCarry


class MinGRUCell(LinearCell):
    """One step of a minGRU (Feng et al. 2024): a GRU whose gate and candidate see the input only.

        z = sigmoid(x Wz + bz)          update gate
        n = g(x Wn + bn)                candidate, with g(x) = x + 1/2 for x >= 0, else sigmoid(x)
        h' = (1 - z) * h + z * n

    The paper computes the logarithm of h, for which g keeps candidates positive. Composing steps
    (`cells.linear`) multiplies by numbers in [0, 1] only, and needs no logarithms for that.
    """

    def setup(self) -> None:
        """Declare the parameters; z, n are side by side."""
        shape = (self.input_size, 2 * self.hidden_size)
        self.input_kernel = self.param("input_kernel", nn.initializers.glorot_uniform(), shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape[1:])

    def coefficients(self, inputs: Float[Array, "*batch inputs"]) -> Coefficients:
        """Return 1 - z and z * n of one or all steps."""
        gates = self.gates(None, inputs)
        return 1 - gates["update"], gates["update"] * gates["candidate"]

    def gates(self, carry: HiddenCarry | None, inputs: Float[Array, "*batch inputs"]) -> Gates:
        """Return the gates of one or all steps, which do not depend on the carry."""
        sums = matmul(inputs, self.input_kernel, self.dtype, self.bias)
        z, n = jnp.split(sums, 2, axis=-1)
        return {"update": nn.sigmoid(z), "candidate": make_positive(n)}


def make_positive(x: Array) -> Array:
    """Return g(x): x + 1/2 for x >= 0, and sigmoid(x) below (Feng et al. 2024, appendix B)."""
    return jnp.where(x >= 0, x + 0.5, nn.sigmoid(x))
