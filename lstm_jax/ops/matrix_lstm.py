"""The mLSTM, an LSTM whose cell state is a matrix (Beck et al. 2024)."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped

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
    implementation: Literal["auto", "scan", "parallel"] = "auto",
) -> tuple[MLSTMCarry, Outputs]:
    """Run an mLSTM over time; `cells/mlstm.py` states its equations.

    The number of heads is that of `params.gate_kernel`. The implementation "scan" runs step by
    step; "parallel", which is "auto", in chunks of 64 steps, all of a chunk at once. Other
    arguments, results and errors are those of `lstm`.
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
    if implementation not in ("auto", "scan", "parallel"):
        raise ValueError(f"implementation is {implementation!r}: choose auto, scan or parallel")
    if not time:
        return first, jnp.zeros((batch, 0, heads * size), steps.dtype)

    def run(params: Any, inputs: Array, first: Any, marks: Marks) -> tuple[MLSTMCarry, Array]:
        params, inputs, first, marks = align((params, inputs, first, marks))
        q, k, v, o, i, log_f = project_mlstm(params, inputs, heads, low)
        # A frozen step writes nothing, even before the first step that does, and keeps everything.
        if marks.frozen is not None:
            frozen = marks.frozen[:, None]
            i, log_f = jnp.where(frozen, 2 * NEVER, i), jnp.where(frozen, 0, log_f)
        chunk = 1 if implementation == "scan" else min(time, _CHUNK)
        last, found = _run_chunks(first, (q, k, v, i, log_f), marks.reset, chunk)
        return last, (o * found).swapaxes(1, 2).reshape(*inputs.shape[:2], -1)

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


def step_mlstm(
    carry: MLSTMCarry, q: Array, k: Array, v: Array, i: Array, log_f: Array
) -> tuple[MLSTMCarry, Float[Array, "batch heads d"]]:
    """Return the next carry, and what is read from the memory.

    q, k and v are [batch, heads, d], and log i (`i`) and log f are [batch, heads].
    """
    f, i, stabilizer = stabilize(carry.stabilizer, i, log_f)
    written = i[..., None, None] * k[..., :, None] * v[..., None, :]
    memory = f[..., None, None] * carry.memory + written
    normalizer = f[..., None] * carry.normalizer + i[..., None] * k
    found = _divide((q[..., None] * memory).sum(-2), (q * normalizer).sum(-1), stabilizer)
    return MLSTMCarry(memory, normalizer, stabilizer), found


def stabilize(before: Array, i: Array, log_f: Array) -> tuple[Array, Array, Array]:
    """Return f exp(m - m'), i exp(-m') and m', from m (`before`), log i (`i`) and log f."""
    kept = log_f + before
    stabilizer = jnp.maximum(kept, i)
    return jnp.exp(kept - stabilizer), jnp.exp(i - stabilizer), stabilizer


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
    carry, found = lax.scan(
        _run_chunk, carry, (cut(q), cut(k), cut(v), cut(i, NEVER), cut(log_f), marks)
    )
    found = jnp.moveaxis(found, 0, 2)
    return carry, found.reshape(*found.shape[:2], -1, found.shape[-1])[:, :, :time]


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
        # Zero times what is not finite is NaN: clear it, and mark the steps that do read it.
        q, reads_bad = _clear_infinite(q, 3)
        (k, v, i, log_f), is_bad = _clear_infinite((k, v, i, log_f), 3)
        carry, is_bad_carry = _clear_infinite(carry, 2)
        ends_bad = (past & is_bad[..., None, :]).any(-1) | (
            is_bad_carry[..., None] & (segment == 0)
        )
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
    found = _divide(weights @ v + kept[..., None] * (q @ carry.memory), size, stabilizer)

    last, after = stabilizer[..., -1], kept[..., -1]
    written = jnp.exp(log_written - last[..., None])[..., None] * k
    memory = after[..., None, None] * carry.memory + written.swapaxes(-1, -2) @ v
    normalizer = after[..., None] * carry.normalizer + written.sum(-2)
    if reset is not None:
        found = jnp.where((reads_bad | ends_bad)[..., None], jnp.nan, found)
        normalizer = jnp.where(ends_bad[..., -1:], jnp.nan, normalizer)
    return MLSTMCarry(memory, normalizer, last), found


def _clear_infinite(arrays: Any, axes: int) -> tuple[Any, Bool[Array, "..."]]:
    """Return arrays that are zero where any is not finite, and where that is: [the first axes]."""
    leaves = jax.tree.leaves(arrays)
    finite = jnp.stack([jnp.isfinite(x).all(tuple(range(axes, x.ndim))) for x in leaves]).all(0)

    def clear(x: Array) -> Array:
        return jnp.where(finite.reshape(*finite.shape, *[1] * (x.ndim - axes)), x, 0)

    return jax.tree.map(clear, arrays), ~finite


def _divide(found: Array, size: Array, stabilizer: Array) -> Array:
    """Return found / max(|size|, exp(-m)), for arrays [..., d], [...] and [...]."""
    # Beyond these limits, the result or its derivative overflows.
    least = jnp.exp(jnp.clip(-stabilizer, -80.0, 80.0))
    # The derivative divides by the square of the denominator: scale it, by a power of 2, to 1/2.
    _, exponent = jnp.frexp(lax.stop_gradient(jnp.maximum(jnp.abs(size), least)))
    scale = jnp.ldexp(jnp.ones_like(least), -exponent)
    return found * scale[..., None] / jnp.maximum(jnp.abs(size * scale), least * scale)[..., None]
