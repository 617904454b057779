"""The real-gated linear recurrent unit (RG-LRU)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_jax.cells.base import HiddenCarry
from lstm_jax.cells.linear import run_linear
from lstm_jax.cells.protocol import Gates
from lstm_jax.matmul import matmul

_SHARPNESS = 8.0  # c in the paper.
# Slowest and fastest decay of an initial hidden unit in a step with r = 1, a = sigmoid(L) ** c.
_LOWEST, _HIGHEST = 0.9, 0.999
# The square root has an infinite slope at 0, where a is 1.
_SMALLEST = 1e-12


class RGLRUCell(nn.Module):
    """One step of an RG-LRU, the recurrence of Griffin (De et al. 2024).

        u = x W + b                                 the linear layer before it in Griffin's block
        r = sigmoid(u Wr + br)                      recurrence gate
        i = sigmoid(u Wi + bi)                      input gate
        a = sigmoid(L) ** (c r)                     decay, with c = 8; L is `decay` [hidden_size]
        h' = a * h + sqrt(1 - a ** 2) * (i * u)

    The square root keeps the variance of h independent of a.
    """

    input_size: int
    hidden_size: int
    dtype: str = "float32"

    def setup(self) -> None:
        """Declare the parameters; r, i are side by side in `gate_kernel` and `gate_bias`."""
        glorot, zeros, size = (
            nn.initializers.glorot_uniform(),
            nn.initializers.zeros,
            self.hidden_size,
        )
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        self.bias = self.param("bias", zeros, (size,))
        self.gate_kernel = self.param("gate_kernel", glorot, (size, 2 * size))
        self.gate_bias = self.param("gate_bias", zeros, (2 * size,))
        self.decay = self.param("decay", _draw_decay, (size,))

    def __call__(self, carry: HiddenCarry, inputs: jax.Array) -> tuple[HiddenCarry, jax.Array]:
        """Return the next carry and the outputs, for inputs [batch, input_size]."""
        a, added, _ = self._compute(inputs)
        hidden = a * carry.hidden + added
        return HiddenCarry(hidden), hidden

    def run_parallel(self, carry: HiddenCarry, inputs: jax.Array) -> tuple[HiddenCarry, jax.Array]:
        """Return the last carry and all outputs, for inputs [batch, time, input_size]."""
        a, added, _ = self._compute(inputs)
        hidden = run_linear(a, added, carry.hidden)
        return HiddenCarry(hidden[:, -1]), hidden

    def gates(self, carry: HiddenCarry, inputs: jax.Array) -> Gates:
        """Return the gates of a step, which do not depend on the carry, and the decay."""
        a, _, gates = self._compute(inputs)
        return {**gates, "decay": a}

    def _compute(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array, Gates]:
        """Return a, what a step adds to a * h, and the gates, of one or all steps."""
        u = matmul(inputs, self.input_kernel, self.dtype) + self.bias
        sums = matmul(u, self.gate_kernel, self.dtype) + self.gate_bias
        r, i = jnp.split(nn.sigmoid(sums), 2, axis=-1)
        log_a = _SHARPNESS * r * nn.log_sigmoid(self.decay)
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), _SMALLEST))
        return jnp.exp(log_a), scale * i * u, {"recurrence": r, "input": i}

    def initial_carry(self, batch_size: int) -> HiddenCarry:
        """Return the carry at the start of a text: zeros."""
        return HiddenCarry(jnp.zeros((batch_size, self.hidden_size)))


def _draw_decay(key: jax.Array, shape: tuple[int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw L so that sigmoid(L) ** c is uniform between `_LOWEST` and `_HIGHEST`."""
    decay = jax.random.uniform(key, shape, dtype, _LOWEST, _HIGHEST) ** (1 / _SHARPNESS)
    return jnp.log(decay) - jnp.log1p(-decay)
