"""The minGRU cell."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from lstm_jax.cells.base import Inputs, LinearCell, Outputs


class MinGRUCell(LinearCell):
    """One step of a minGRU (Feng et al. 2024): a GRU whose gate and candidate see the input only.

        z = sigmoid(x Wz + bz)          update gate
        n = g(x Wn + bn)                candidate, with g(x) = x + 1/2 for x >= 0, else sigmoid(x)
        h' = (1 - z) * h + z * n

    The paper computes the logarithm of h, for which g keeps candidates positive. Composing steps
    (`ops.linear_scan`) multiplies by numbers in [0, 1] only, and needs no logarithms for that.
    """

    def setup(self) -> None:
        """Declare the parameters; z, n are side by side."""
        self.declare_kernels(2, is_recurrent=False)

    def coefficients(self, inputs: Inputs) -> tuple[Outputs, Outputs]:
        """Return 1 - z and z * n of one or all steps."""
        z, n = jnp.split(self.project_inputs(inputs), 2, axis=-1)
        z = nn.sigmoid(z)
        return 1 - z, z * make_positive(n)


def make_positive(x: Array) -> Array:
    """Return g(x): x + 1/2 for x >= 0, and sigmoid(x) below (Feng et al. 2024, appendix B)."""
    return jnp.where(x >= 0, x + 0.5, nn.sigmoid(x))
