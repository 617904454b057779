"""The mLSTM cell."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.cells.base import SizedCell, forget_bias
from lstm_jax.cells.protocol import Gates
from lstm_jax.cells.slstm import NEVER, count_per_head, stabilize
from lstm_jax.matmul import matmul

_CHUNK = 64  # Steps of a chunk of the parallel form.


class MLSTMCarry(NamedTuple):
    """The carry of one mLSTM layer with d = hidden_size / heads, float32."""

    memory: jax.Array  # C / exp(m): [batch, heads, d, d].
    normalizer: jax.Array  # n / exp(m): [batch, heads, d].
    stabilizer: jax.Array  # m: [batch, heads].


class MLSTMCell(SizedCell):
    """One step of an mLSTM: an LSTM whose cell state is a matrix (Beck et al. 2024).

    Each of the heads has d = hidden_size / heads hidden units:

        q = x Wq + bq                           query [d]
        k = (x Wk + bk) / sqrt(d)               key [d]
        v = x Wv + bv                           value [d]
        i = exp(x wi + bi)                      input gate, a number for each head
        f = sigmoid(x wf + bf)                  forget gate, a number for each head
        o = sigmoid(x Wo + bo)                  output gate [d]
        C' = f C + i k v^T                      memory: values stored under keys
        n' = f n + i k                          normalizer
        h' = o * (q^T C') / max(|q . n'|, 1)    the value under the query

    C and n are divided by exp(m), with the stabilizer m' = max(log f + m, log i), and the 1 becomes
    exp(-m'), so that no exponential overflows.
    """

    heads: int = 4

    def setup(self) -> None:
        """Declare the parameters; q, k, v, o are side by side, and so are i, f of all heads."""
        count_per_head(self.hidden_size, self.heads)
        glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros
        size = 4 * self.hidden_size
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        self.bias = self.param("bias", zeros, (size,))
        self.gate_kernel = self.param("gate_kernel", zeros, (self.input_size, 2 * self.heads))
        remembering = forget_bias(2, jnp.linspace(3, 6, self.heads))
        self.gate_bias = self.param("gate_bias", remembering, (2 * self.heads,))

    def __call__(self, carry: MLSTMCarry, inputs: jax.Array) -> tuple[MLSTMCarry, jax.Array]:
        """Return the next carry and the outputs, for inputs [batch, input_size]."""
        q, k, v, o, i, log_f = (x[..., 0, :] for x in self._project(inputs[:, None]))
        f, i, stabilizer = stabilize(carry.stabilizer, i[..., 0], log_f[..., 0])
        written = i[..., None, None] * k[..., :, None] * v[..., None, :]
        memory = f[..., None, None] * carry.memory + written
        normalizer = f[..., None] * carry.normalizer + i[..., None] * k
        size = jnp.abs((q * normalizer).sum(-1))
        found = (q[..., None] * memory).sum(-2)
        hidden = o * found / jnp.maximum(size, _exp_minus(stabilizer))[..., None]
        return MLSTMCarry(memory, normalizer, stabilizer), hidden.reshape(len(inputs), -1)

    def run_parallel(
        self, carry: MLSTMCarry, inputs: jax.Array, starts: jax.Array | None
    ) -> tuple[MLSTMCarry, jax.Array]:
        """Return the last carry and all outputs, for inputs [batch, time, input_size].

        A scan over chunks of `_CHUNK` steps. Within a chunk, step t reads the memory before it and
        the values that steps s <= t write, with the weights D[t, s] (q_t . k_s), where log D[t, s]
        is log i_s plus the sum of log f_r over s < r <= t.
        """
        batch, time, _ = inputs.shape
        chunk = min(time, _CHUNK)
        q, k, v, o, i, log_f = self._project(inputs)

        def cut(x: jax.Array, filling: float = 0.0) -> jax.Array:
            """Return [chunks, batch, heads, chunk, ...]; steps after the last change nothing."""
            padding = [(0, 0)] * x.ndim
            padding[2] = (0, -time % chunk)
            x = jnp.pad(x, padding, constant_values=filling)
            return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

        cut_starts = None if starts is None else cut(starts[:, None])
        steps = cut(q), cut(k), cut(v), cut(i[..., 0], NEVER), cut(log_f[..., 0]), cut_starts
        carry, found = lax.scan(_run_chunk, carry, steps)
        found = jnp.moveaxis(found, 0, 2).reshape(batch, self.heads, -1, q.shape[-1])[:, :, :time]
        return carry, (o * found).swapaxes(1, 2).reshape(batch, time, -1)

    def _project(self, inputs: jax.Array) -> list[jax.Array]:
        """Return q, k, v, o [batch, heads, time, d], and log i, log f [batch, heads, time, 1]."""
        sums = matmul(inputs, self.input_kernel, self.dtype, self.bias)
        gates = matmul(inputs, self.gate_kernel, self.dtype, self.gate_bias)
        parts = [*jnp.split(sums, 4, axis=-1), *jnp.split(gates, 2, axis=-1)]
        q, k, v, o, i, f = (x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2) for x in parts)
        return [q, k / math.sqrt(k.shape[-1]), v, nn.sigmoid(o), i, nn.log_sigmoid(f)]

    def gates(self, carry: MLSTMCarry, inputs: jax.Array) -> Gates:
        """Return the gates of a step, the first two as i exp(-m') and f exp(m - m')."""
        *_, o, i, log_f = (x[..., 0, :] for x in self._project(inputs[:, None]))
        f, i, _ = stabilize(carry.stabilizer, i[..., 0], log_f[..., 0])
        i, f = (jnp.repeat(gate, o.shape[-1], axis=1) for gate in (i, f))
        return {"input": i, "forget": f, "output": o.reshape(len(inputs), -1)}

    def initial_carry(self, batch_size: int) -> MLSTMCarry:
        """Return the carry at the start of a text: zeros, and a stabilizer of minus infinity."""
        size = count_per_head(self.hidden_size, self.heads)
        shape = batch_size, self.heads
        return MLSTMCarry(
            jnp.zeros((*shape, size, size)), jnp.zeros((*shape, size)), jnp.full(shape, NEVER)
        )


def _run_chunk(carry: MLSTMCarry, steps: tuple[Any, ...]) -> tuple[MLSTMCarry, jax.Array]:
    """Run a chunk: q, k, v [batch, heads, chunk, d], log i and log f [batch, heads, chunk].

    The last of the steps' arrays is where documents begin, bool [batch, 1, chunk], or None. Return
    the next carry, and what each step reads from the memory, [batch, heads, chunk, d].
    """
    q, k, v, i, log_f, starts = steps
    since = jnp.cumsum(log_f, axis=-1)  # log f, summed from the start of the chunk to each step.
    past = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
    log_kept = since + carry.stabilizer[..., None]
    log_written = i + since[..., -1:] - since
    if starts is not None:  # A step reads what the steps of its document wrote.
        document = jnp.cumsum(starts, axis=-1)
        past = past[None, None] & (document[..., :, None] == document[..., None, :])
        log_kept = jnp.where(document > 0, NEVER, log_kept)
        log_written = jnp.where(document == document[..., -1:], log_written, NEVER)
    log_d = jnp.where(past, since[..., :, None] + (i - since)[..., None, :], NEVER)
    stabilizer = jnp.maximum(log_kept, log_d.max(axis=-1))
    weights = jnp.exp(log_d - stabilizer[..., None]) * (q @ k.swapaxes(-1, -2))
    kept = jnp.exp(log_kept - stabilizer)
    size = weights.sum(-1) + kept * (q @ carry.normalizer[..., None])[..., 0]
    found = weights @ v + kept[..., None] * (q @ carry.memory)
    found /= jnp.maximum(jnp.abs(size), _exp_minus(stabilizer))[..., None]

    last = stabilizer[..., -1]
    written = jnp.exp(log_written - last[..., None])[..., None] * k
    after = kept[..., -1]
    memory = after[..., None, None] * carry.memory + written.swapaxes(-1, -2) @ v
    normalizer = after[..., None] * carry.normalizer + written.sum(-2)
    return MLSTMCarry(memory, normalizer, last), found


def _exp_minus(stabilizer: jax.Array) -> jax.Array:
    """Return exp(-m), limited to a number whose gradient is finite."""
    return jnp.exp(jnp.minimum(-stabilizer, 80.0))
