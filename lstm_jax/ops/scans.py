"""Recurrences whose steps can be computed at once: h' = a * h + b, and the mLSTM."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Shaped

from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import HiddenCarry, Marks, align, clear
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


def linear_scan(
    decays: Inputs,
    terms: Inputs,
    carry: HiddenCarry | None = None,
    *,
    reset: Reset = None,
    lengths: Lengths = None,
    reverse: bool = False,
    implementation: Literal["auto", "scan", "parallel"] = "auto",
) -> tuple[HiddenCarry, Outputs]:
    """Compute h' = a * h + b over time, as in minGRU, minLSTM, RG-LRU and state space models.

    The decays a and the terms b are floats [batch, time, features]. `implementation` is "scan",
    step by step; "parallel", an associative scan in log2(time) rounds (Blelloch 1990); or "auto",
    "scan" on CPUs, where it reads the memory once, and "parallel" elsewhere. Other arguments,
    results (the outputs are h) and errors are those of `lstm`.
    """
    a, b, first, reset, lengths = check(
        decays=(decays, Float[Array, "batch time hidden"]),
        terms=(terms, Float[Array, "batch time hidden"]),
        carry=(carry, HiddenCarry),
        reset=(reset, Shaped[Array, "batch time"]),
        lengths=(lengths, Integer[Array, " batch"]),
    )
    (batch, time, features), (_, wide) = a.shape, choose_dtypes(None, a, b, first)
    first = HiddenCarry.zeros(batch, features, wide) if first is None else first
    if implementation not in ("auto", "scan", "parallel"):
        raise ValueError(f"implementation is {implementation!r}: choose auto, scan or parallel")
    if not time:
        return first, b.astype(jnp.result_type(a, b))
    choice = "scan" if jax.default_backend() == "cpu" else "parallel"
    is_scan = (choice if implementation == "auto" else implementation) == "scan"

    def run(_: tuple[()], inputs: Any, first: Any, marks: Marks) -> tuple[HiddenCarry, Array]:
        (a, b), (first_hidden,), marks = align((inputs, first, marks))
        if marks.reset is not None:
            a = jnp.where(marks.reset[..., None], 0, a)
        if marks.frozen is not None:
            a = jnp.where(marks.frozen[..., None], 1, a)
        outputs = (_scan if is_scan else _compose)(a, b, first_hidden, marks.reset)
        return HiddenCarry(outputs[:, -1]), outputs

    return run_in_order(run, wide, reverse, (), (a, b), first, reset, lengths)


def _scan(a: Array, b: Array, first: Array, reset: Array | None) -> Array:
    def step(hidden: Array, xs: tuple[Any, ...]) -> tuple[Array, Array]:
        a, b, mark = xs
        hidden = a * clear(hidden, mark) + b
        return hidden, hidden

    _, hidden = lax.scan(step, first, jax.tree.map(lambda x: x.swapaxes(0, 1), (a, b, reset)))
    return hidden.swapaxes(0, 1)


def _compose(a: Array, b: Array, first: Array, reset: Array | None) -> Array:
    """Compute `_scan` by composing steps.

    The composition of two steps is a step, (a2 a1, a2 b1 + b2), and composing is associative. After
    a reset, a1 and b1 are cleared: they may not be finite.
    """

    def compose(earlier: tuple[Any, ...], later: tuple[Any, ...]) -> tuple[Any, ...]:
        a2, b2, was_reset = later
        a1, b1 = clear(earlier[:2], was_reset)
        return a2 * a1, a2 * b1 + b2, jax.tree.map(jnp.logical_or, earlier[2], was_reset)

    decays, hidden, was_reset = lax.associative_scan(compose, (a, b, reset), axis=1)
    return decays * clear(first[:, None], was_reset) + hidden


class MLSTMParams(NamedTuple):
    """Parameters of an mLSTM layer (Beck et al. 2024) of hidden / d heads with d hidden units."""

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

    The number of heads is that of `params.gate_kernel`. 64 steps are computed at once. Arguments,
    results and errors are those of `lstm`.
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
    first = MLSTMCarry.zeros(batch, heads, size, wide) if first is None else first
    if first.normalizer.shape[1:] != (heads, size):
        raise ValueError(f"carry.normalizer must be [batch, {heads}, {size}]")
    if not time:
        return first, jnp.zeros((batch, 0, heads * size), steps.dtype)

    chunk = min(time, _CHUNK)

    def cut(x: Array, filling: float = 0.0) -> Array:
        """Return [chunks, batch, heads, chunk, ...]; steps after the last change nothing."""
        padding = [(0, 0)] * x.ndim
        padding[2] = (0, -time % chunk)
        x = jnp.pad(x, padding, constant_values=filling)
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    def run(params: Any, inputs: Array, first: Any, marks: Marks) -> tuple[MLSTMCarry, Array]:
        params, inputs, first, marks = align((params, inputs, first, marks))
        q, k, v, o, i, log_f = project_mlstm(params, inputs, heads, low)
        # A frozen step writes nothing, even before the first step that does, and keeps everything.
        if marks.frozen is not None:
            frozen = marks.frozen[:, None]
            i, log_f = jnp.where(frozen, 2 * NEVER, i), jnp.where(frozen, 0, log_f)
        starts = None if marks.reset is None else cut(marks.reset[:, None])
        chunks = cut(q), cut(k), cut(v), cut(i, NEVER), cut(log_f), starts
        last, values = lax.scan(_run_chunk, first, chunks)
        values = jnp.moveaxis(values, 0, 2).reshape(*o.shape[:2], -1, size)[:, :, :time]
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


def _run_chunk(carry: MLSTMCarry, steps: tuple[Any, ...]) -> tuple[MLSTMCarry, Array]:
    """Run a chunk: q, k, v [batch, heads, chunk, d], log i and log f [batch, heads, chunk].

    The last array is where the carry is reset, bool [batch, 1, chunk], or None. Return the next
    carry, and what each step reads from the memory, [batch, heads, chunk, d].

    Step t reads the memory before the chunk and the values that steps s <= t write, with the
    weights D[t, s] (q_t . k_s), where log D[t, s] is log i_s plus the sum of log f_r over
    s < r <= t.
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
    carry_weights = jnp.exp(log_kept - stabilizer)
    size = weights.sum(-1) + carry_weights * (q @ carry.normalizer[..., None])[..., 0]
    values = _divide(weights @ v + carry_weights[..., None] * (q @ carry.memory), size, stabilizer)

    last, decay = stabilizer[..., -1], carry_weights[..., -1]
    writes = jnp.exp(log_written - last[..., None])[..., None] * k
    memory = decay[..., None, None] * carry.memory + writes.swapaxes(-1, -2) @ v
    normalizer = decay[..., None] * carry.normalizer + writes.sum(-2)
    if reset is not None:
        values = jnp.where((reads_bad | ends_bad)[..., None], jnp.nan, values)
        normalizer = jnp.where(ends_bad[..., -1:], jnp.nan, normalizer)
    return MLSTMCarry(memory, normalizer, last), values


def _clear_infinite(arrays: Any, axes: int) -> tuple[Any, Array]:
    """Return arrays that are zero where any is not finite, and where that is: [the first axes]."""
    leaves = jax.tree.leaves(arrays)
    finite = jnp.stack([jnp.isfinite(x).all(tuple(range(axes, x.ndim))) for x in leaves]).all(0)

    def clear_one(x: Array) -> Array:
        return jnp.where(finite.reshape(*finite.shape, *[1] * (x.ndim - axes)), x, 0)

    return jax.tree.map(clear_one, arrays), ~finite


def _divide(values: Array, size: Array, stabilizer: Array) -> Array:
    """Return values / max(|size|, exp(-m)), for arrays [..., d], [...] and [...]."""
    # Beyond these limits, the result or its derivative overflows.
    least = jnp.exp(jnp.clip(-stabilizer, -80.0, 80.0))
    # The derivative divides by the square of the denominator: scale it, by a power of 2, to 1/2.
    _, exponent = jnp.frexp(lax.stop_gradient(jnp.maximum(jnp.abs(size), least)))
    scale = jnp.ldexp(jnp.ones_like(least), -exponent)
    return values * scale[..., None] / jnp.maximum(jnp.abs(size * scale), least * scale)[..., None]
