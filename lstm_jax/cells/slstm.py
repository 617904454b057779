"""The sLSTM cell."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lstm_jax.cells.base import Cell, Inputs, Outputs, forget_bias
from lstm_jax.errors import UserError
from lstm_jax.matmul import matmul
from lstm_jax.ops.scans import NEVER


class SLSTMCarry(NamedTuple):
    """The carry of one sLSTM layer."""

    cell: Float[Array, "batch hidden"]  # c / exp(m).
    normalizer: Float[Array, "batch hidden"]  # n / exp(m).
    hidden: Float[Array, "batch hidden"]  # h, which is also the layer's output.
    stabilizer: Float[Array, "batch hidden"]  # m.


class SLSTMCell(Cell):
    """One step of an sLSTM: an LSTM with an exponential input gate (Beck et al. 2024).

        i = exp(x Wi + h Ri + bi)           input gate, of any size
        f = sigmoid(x Wf + h Rf + bf)       forget gate
        z = tanh(x Wz + h Rz + bz)          candidate
        o = sigmoid(x Wo + h Ro + bo)       output gate
        c' = f * c + i * z
        n' = f * n + i                      normalizer: the sum of the weights in c
        h' = o * c' / n'

    c and n are divided by exp(m), with the stabilizer m' = max(log f + m, log i), so that no
    exponential overflows; h' is the same for any m. The kernels R are block-diagonal: each of the
    heads has hidden_size / heads hidden units, which read those of their own head.
    `recurrent_kernel` is [heads, hidden_size / heads, 4 * hidden_size / heads].
    """

    heads: int = 4

    def setup(self) -> None:
        """Declare the parameters; i, f, z, o are side by side."""
        per_head = count_per_head(self.hidden_size, self.heads)
        glorot, size = nn.initializers.glorot_uniform(), 4 * self.hidden_size
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        shape = (self.heads, per_head, 4 * per_head)
        self.recurrent_kernel = self.param("recurrent_kernel", _draw_orthogonal, shape)
        bias_init = forget_bias(4, jnp.linspace(3, 6, self.hidden_size))
        self.bias = self.param("bias", bias_init, (size,))

    def __call__(self, carry: SLSTMCarry, inputs: Inputs) -> tuple[SLSTMCarry, Outputs]:
        batch = len(inputs)
        by_head = carry.hidden.reshape(batch, self.heads, -1).swapaxes(0, 1)
        recurrent = matmul(by_head, self.recurrent_kernel, self.dtype)  # [heads, batch, 4 * d].
        recurrent = recurrent.reshape(self.heads, batch, 4, -1).transpose(1, 2, 0, 3)
        sums = self.project_inputs(inputs) + recurrent.reshape(batch, -1)
        i, f, z, o = jnp.split(sums, 4, axis=-1)
        log_kept = nn.log_sigmoid(f) + carry.stabilizer
        stabilizer = jnp.maximum(log_kept, i)
        f, i = jnp.exp(log_kept - stabilizer), jnp.exp(i - stabilizer)
        cell = f * carry.cell + i * jnp.tanh(z)
        normalizer = f * carry.normalizer + i
        hidden = nn.sigmoid(o) * cell / normalizer
        return SLSTMCarry(cell, normalizer, hidden, stabilizer), hidden

    def activation(self, carry: SLSTMCarry) -> Outputs:
        """Return c / n, a weighted mean of candidates, in [-1, 1]."""
        return carry.cell / carry.normalizer

    def initial_carry(self, batch_size: int) -> SLSTMCarry:
        """Return the carry at the start of a text: zeros, and a stabilizer of `NEVER`."""
        shape = batch_size, self.hidden_size
        return SLSTMCarry(
            jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape), jnp.full(shape, NEVER)
        )


def count_per_head(hidden_size: int, heads: int) -> int:
    """Return the number of hidden units of each head; raise `UserError` if it is not whole."""
    if heads < 1 or hidden_size % heads:
        raise UserError(
            f"config.model.options.heads is {heads}: it must divide the hidden units of each "
            f"layer, {hidden_size}"
        )
    return hidden_size // heads


def _draw_orthogonal(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw an orthogonal kernel for each head."""
    draw = nn.initializers.orthogonal()
    return jax.vmap(lambda of_head: draw(of_head, shape[1:]))(jax.random.split(key, shape[0]))
