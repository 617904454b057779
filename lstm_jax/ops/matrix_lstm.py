"""The mLSTM, an LSTM whose cell state is a matrix (Beck et al. 2024)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Shaped

from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import Marks, align
from lstm_jax.ops.sequences import (
    Inputs,
    Lengths,
    Outputs,
    Reset,
    check,
    choose_dtypes,
    run_in_order,
)

_CHUNK = 64  # Steps of a chunk of the parallel form.
# The stabilizer before the first step, at which nothing is kept: its exponential is 0.
NEVER = -1e30


class MLSTMParams(NamedTuple):
    """Parameters of an mLSTM layer with hidden / d heads of d hidden units each."""

    input_kernel: Float[Array, "features columns"]  # Of q, k, v, o: 4 * hidden columns.
    bias: Float[Array, " columns"]
    gate_kernel: Float[Array, "features gates"]  # Of i, f of all heads: 2 * heads columns.
    gate_bias: Float[Array, " gates"]


class MLSTMCarry(NamedTuple):
    """The carry of an mLSTM layer with d = hidden / heads."""

    memory: Float[Array, "batch heads d d"]  # C / exp(m).
    normalizer: Float[Array, "batch heads d"]  # n / exp(m).
    stabilizer: Float[Array, "batch heads"]  # m.

    @classmethod
    def zeros(
        cls, batch: int, heads: int, size: int, dtype: DTypeLike = jnp.float32
    ) -> "MLSTMCarry":
        """Return the carry before the first step, with `size` hidden units in each head."""
        shapes = (batch, heads, size, size), (batch, heads, size)
        memory, normalizer = (jnp.zeros(shape, dtype) for shape in shapes)
        return cls(memory, normalizer, jnp.full((batch, heads), NEVER, dtype))


def mlstm(
    params: MLSTMParams,
    inputs: Inputs,
    carry: MLSTMCarry | None = None,
    *,
    reset: Reset = None,
    lengths: Lengths = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
) -> tuple[MLSTMCarry, Outputs]:
    """Run an mLSTM over time; `cells/mlstm.py` states its equations.

    The number of heads is that of `params.gate_kernel`. All of 64 steps are computed at once. A
    number that is not finite may reach the steps after a reset. Other than this, arguments, results
    and errors are those of `lstm`.
    """
    steps, params, first, reset, lengths = check(
        inputs=(inputs, Float[Array, "batch time features"]),
        params=(params, MLSTMParams),
        carry=(carry, MLSTMCarry),
        reset=(reset, Shaped[Array, "batch time"]),
        lengths=(lengths, Integer[Array, " batch"]),
    )
    (batch, time, _), heads, columns = steps.shape, len(params.gate_bias) // 2, len(params.bias)
    if not heads or columns % (4 * heads):
        raise ValueError(f"{heads} heads can't share the {columns} columns of params.bias equally")
    size = columns // (4 * heads)
    low, wide = choose_dtypes(dtype, steps, params, first)
    if first is None:
        first = MLSTMCarry.zeros(batch, heads, size, wide)
    if first.normalizer.shape[1:] != (heads, size):
        raise ValueError(f"carry.normalizer must be [batch, {heads}, {size}]")
    if not time:
        return first, jnp.zeros((batch, 0, heads * size), steps.dtype)

    def run(params: Any, inputs: Array, first: Any, marks: Marks) -> tuple[MLSTMCarry, Array]:
        params, inputs, first, marks = align((params, inputs, first, marks))
        q, k, v, o, i, log_f = project_mlstm(params, inputs, heads, low)
        # A frozen step writes nothing, even before the first step that does, and keeps everything.
        if marks.frozen is not None:
            frozen = marks.frozen[:, None]
            i, log_f = jnp.where(frozen, 2 * NEVER, i), jnp.where(frozen, 0, log_f)
        last, values = _run_chunks(first, (q, k, v, i, log_f), marks.reset, min(time, _CHUNK))
        return last, (o * values).swapaxes(1, 2).reshape(*inputs.shape[:2], -1)

    return run_in_order(run, wide, reverse, params, steps, first, reset, lengths)


def project_mlstm(
    params: MLSTMParams, inputs: Float[Array, "batch time features"], heads: int, dtype: str
) -> tuple[Float[Array, "batch heads time ..."], ...]:
    """Return q, k, v, o [batch, heads, time, d], and log i, log f [batch, heads, time].

    The operands of matmuls are rounded to `dtype`.
    """
    sums = matmul(inputs, params.input_kernel, dtype, params.bias)
    gates = matmul(inputs, params.gate_kernel, dtype, params.gate_bias)
    parts = [*jnp.split(sums, 4, axis=-1), *jnp.split(gates, 2, axis=-1)]
    q, k, v, o, i, f = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in parts)
    k, log_f = k / math.sqrt(k.shape[-1]), jax.nn.log_sigmoid(f)
    return q, k, v, jax.nn.sigmoid(o), i[..., 0], log_f[..., 0]


def _run_chunks(
    carry: MLSTMCarry, arrays: tuple[Array, ...], reset: Array | None, chunk: int
) -> tuple[MLSTMCarry, Array]:
    """Run all steps, a chunk at a time; return the last carry, and what they read from the memory.

    `arrays` are q, k, v [batch, heads, time, d], log i and log f [batch, heads, time]. Within a
    chunk, step t reads the memory before it and the values that steps s <= t write, with the
    weights D[t, s] (q_t . k_s), where log D[t, s] is log i_s plus the sum of log f_r over s < r <=
    t.
    """
    time = arrays[0].shape[2]

    def cut(x: Array, filling: float = 0.0) -> Array:
        """Return [chunks, batch, heads, chunk, ...]; steps after the last change nothing."""
        padding = [(0, 0)] * x.ndim
        padding[2] = (0, -time % chunk)
        x = jnp.pad(x, padding, constant_values=filling)
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    q, k, v, i, log_f = arrays
    marks = None if reset is None else cut(reset[:, None])
    chunks = cut(q), cut(k), cut(v), cut(i, NEVER), cut(log_f), marks
    carry, values = lax.scan(_run_chunk, carry, chunks)
    values = jnp.moveaxis(values, 0, 2)
    return carry, values.reshape(*values.shape[:2], -1, values.shape[-1])[:, :, :time]


def _run_chunk(carry: MLSTMCarry, steps: tuple[Any, ...]) -> tuple[MLSTMCarry, Array]:
    """Run a chunk: q, k, v [batch, heads, chunk, d], log i and log f [batch, heads, chunk].

    The last array is where the carry is reset, bool [batch, 1, chunk], or None. Return the next
    carry, and what each step reads from the memory, [batch, heads, chunk, d].
    """
    q, k, v, i, log_f, reset = steps
    past: Any = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
    if reset is not None:  # A step reads what was written since the last reset.
        segment = jnp.cumsum(reset, axis=-1)
        past = past[None, None] & (segment[..., :, None] == segment[..., None, :])
    since = jnp.cumsum(log_f, axis=-1)  # log f, summed from the start of the chunk to each step.
    log_kept = since + carry.stabilizer[..., None]
    log_written = i + since[..., -1:] - since
    if reset is not None:
        log_kept = jnp.where(segment > 0, NEVER, log_kept)
        log_written = jnp.where(segment == segment[..., -1:], log_written, NEVER)
    log_d = jnp.where(past, since[..., :, None] + (i - since)[..., None, :], NEVER)
    stabilizer = jnp.maximum(log_kept, log_d.max(axis=-1))
    weights = jnp.exp(log_d - stabilizer[..., None]) * (q @ k.swapaxes(-1, -2))
    kept = jnp.exp(log_kept - stabilizer)
    size = weights.sum(-1) + kept * (q @ carry.normalizer[..., None])[..., 0]
    values = _divide(weights @ v + kept[..., None] * (q @ carry.memory), size, stabilizer)

    last, after = stabilizer[..., -1], kept[..., -1]
    written = jnp.exp(log_written - last[..., None])[..., None] * k
    memory = after[..., None, None] * carry.memory + written.swapaxes(-1, -2) @ v
    normalizer = after[..., None] * carry.normalizer + written.sum(-2)
    return MLSTMCarry(memory, normalizer, last), values


def _divide(values: Array, size: Array, stabilizer: Array) -> Array:
    """Return values / max(|size|, exp(-m)), for arrays [..., d], [...] and [...]."""
    # Beyond these limits, the result or its derivative overflows.
    least = jnp.exp(jnp.clip(-stabilizer, -80.0, 80.0))
    # The derivative divides by the square of the denominator: scale it, by a power of 2, to 1/2.
    _, exponent = jnp.frexp(lax.stop_gradient(jnp.maximum(jnp.abs(size), least)))
    scale = jnp.ldexp(jnp.ones_like(least), -exponent)
    return values * scale[..., None] / jnp.maximum(jnp.abs(size * scale), least * scale)[..., None]
