"""The real-gated linear recurrent unit (RG-LRU)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from lstm_jax.cells.base import Inputs, LinearCell, Outputs
from lstm_jax.matmul import matmul

_SHARPNESS = 8.0  # c in the paper.
# The range of initial decays in a step with r = 1, a = sigmoid(L) ** c.
_LOWEST, _HIGHEST = 0.9, 0.999
# The square root has an infinite slope at 0, where a is 1.
_SMALLEST = 1e-12


class RGLRUCell(LinearCell):
    """One step of an RG-LRU, the recurrence of Griffin (De et al. 2024).

        u = x W + b                                 the linear layer before it in Griffin's block
        r = sigmoid(u Wr + br)                      recurrence gate
        i = sigmoid(u Wi + bi)                      input gate
        a = sigmoid(L) ** (c r)                     decay, with c = 8; L is `decay` [hidden_size]
        h' = a * h + sqrt(1 - a ** 2) * (i * u)

    The square root keeps the variance of h independent of a.
    """

    def setup(self) -> None:
        """Declare the parameters; r, i are side by side in `gate_kernel` and `gate_bias`."""
        glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros
        size = self.hidden_size
        self.declare_kernels(1, is_recurrent=False)
        self.gate_kernel = self.param("gate_kernel", glorot, (size, 2 * size))
        self.gate_bias = self.param("gate_bias", zeros, (2 * size,))
        self.decay = self.param("decay", _draw_decay, (size,))

    def coefficients(self, inputs: Inputs) -> tuple[Outputs, Outputs]:
        """Return a and sqrt(1 - a ** 2) * (i * u) of one or all steps."""
        u = self.project_inputs(inputs)
        sums = matmul(u, self.gate_kernel, self.dtype, self.gate_bias)
        r, i = jnp.split(nn.sigmoid(sums), 2, axis=-1)
        log_a = _SHARPNESS * r * jnp.broadcast_to(nn.log_sigmoid(self.decay), r.shape)
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), _SMALLEST))
        return jnp.exp(log_a), scale * (i * u)


def _draw_decay(key: Array, shape: tuple[int]) -> Array:
    """Draw L so that sigmoid(L) ** c is uniform between `_LOWEST` and `_HIGHEST`."""
    decay = jax.random.uniform(key, shape, jnp.float32, _LOWEST, _HIGHEST) ** (1 / _SHARPNESS)
    return jnp.log(decay) - jnp.log1p(-decay)
