"""The mLSTM, an LSTM whose cell state is a matrix (Beck et al. 2024)."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from lstm_jax.matmul import matmul
from lstm_jax.ops.arguments import convert_flags, convert_floats, convert_lengths
from lstm_jax.ops.layer import turn

_CHUNK = 64  # Steps of a chunk of the parallel form.
# The stabilizer before the first step, at which nothing is kept: its exponential is 0.
NEVER = -1e30


class MLSTMParams(NamedTuple):
    """Parameters of an mLSTM layer with hidden / d heads of d hidden units each."""

    input_kernel: jax.Array  # Of q, k, v, o: [features, 4 * hidden].
    bias: jax.Array  # [4 * hidden].
    gate_kernel: jax.Array  # Of i, f of all heads: [features, 2 * heads].
    gate_bias: jax.Array  # [2 * heads].


class MLSTMCarry(NamedTuple):
    """The carry of an mLSTM layer with d = hidden / heads."""

    memory: jax.Array  # C / exp(m): [batch, heads, d, d].
    normalizer: jax.Array  # n / exp(m): [batch, heads, d].
    stabilizer: jax.Array  # m: [batch, heads].

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
    inputs: ArrayLike,
    carry: MLSTMCarry | None = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Literal["auto", "scan", "parallel"] = "auto",
) -> tuple[MLSTMCarry, jax.Array]:
    """Run an mLSTM over time; `cells/mlstm.py` states its equations.

    The number of heads is that of `params.gate_kernel`. The implementation "scan" runs step by
    step; "parallel", which is "auto", in chunks of 64 steps, all of a chunk at once. Other
    arguments, results and errors are those of `lstm`.
    """
    inputs = convert_floats("inputs", inputs, "batch", "time", "features")
    batch, time, features = inputs.shape
    heads, size = _check_params(params, features)
    if implementation not in ("auto", "scan", "parallel"):
        raise ValueError(f"implementation is {implementation!r}: choose auto, scan or parallel")
    if carry is None:
        carry = MLSTMCarry.zeros(batch, heads, size, inputs.dtype)
    shapes = (batch, heads, size, size), (batch, heads, size), (batch, heads)
    if not isinstance(carry, tuple) or len(carry) != len(shapes):
        raise ValueError(f"carry is a {type(carry).__name__}: it must be an MLSTMCarry, or None")
    parts = zip(MLSTMCarry._fields, carry, shapes, strict=True)
    carry = MLSTMCarry(*(_check_state(name, x, shape) for name, x, shape in parts))
    reset = convert_flags("reset", reset, (batch, time))
    lengths = convert_lengths(lengths, batch)
    if not time:
        return carry, jnp.zeros((batch, 0, heads * size), inputs.dtype)
    low = "bfloat16" if jnp.dtype(dtype or inputs.dtype) == jnp.bfloat16 else "float32"
    if reverse:
        inputs = turn(inputs, lengths)
        reset = None if reset is None else turn(reset, lengths)
    frozen = None
    if lengths is not None:
        frozen = jnp.arange(time) >= lengths[:, None]
        inputs = jnp.where(frozen[..., None], 0, inputs)  # What is there may not be finite.
    wide = jnp.promote_types(jnp.result_type(*jax.tree.leaves((params, inputs, carry))), "float32")
    arrays = jax.tree.map(lambda x: x.astype(wide), (params, inputs, carry))
    q, k, v, o, i, log_f = project_mlstm(arrays[0], arrays[1], heads, low)
    if frozen is not None:  # A frozen step writes nothing, and keeps everything.
        i, log_f = jnp.where(frozen[:, None], NEVER, i), jnp.where(frozen[:, None], 0, log_f)
        reset = None if reset is None else reset & ~frozen
    run = _scan if implementation == "scan" else _run_chunks
    last, found = run(arrays[2], (q, k, v, i, log_f), reset)
    outputs = (o * found).swapaxes(1, 2).reshape(batch, time, -1)
    if frozen is not None:
        outputs = jnp.where(frozen[..., None], 0, outputs)
    outputs = turn(outputs, lengths) if reverse else outputs
    last = jax.tree.map(lambda x, y: x.astype(y.dtype), last, carry)
    return last, outputs.astype(inputs.dtype)


def _check_params(params: MLSTMParams, features: int) -> tuple[int, int]:
    """Return the number of heads, and the hidden units of each, from parameters that fit."""
    if not isinstance(params, MLSTMParams):
        raise ValueError(f"params is a {type(params).__name__}: ops.mlstm takes MLSTMParams")
    width, heads = len(params.bias), len(params.gate_bias) // 2
    shapes = (features, width), (width,), (features, 2 * heads), (2 * heads,)
    for (name, array), shape in zip(params._asdict().items(), shapes, strict=True):
        if jnp.shape(array) != shape:
            raise ValueError(
                f"params.{name} has the shape {jnp.shape(array)}: with inputs of {features} "
                f"features and these biases, it must be {shape}"
            )
    if not heads or width % (4 * heads):
        raise ValueError(f"{heads} heads can't share {width // 4} hidden units equally")
    return heads, width // (4 * heads)


def _check_state(name: str, value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"carry.{name} has the dtype {array.dtype} and the shape {array.shape}: it must be "
            f"floats of the shape {shape}"
        )
    return array


def project_mlstm(
    params: MLSTMParams, inputs: jax.Array, heads: int, dtype: str
) -> tuple[jax.Array, ...]:
    """Return q, k, v, o [batch, heads, time, d], and log i, log f [batch, heads, time].

    The factors of matmuls are rounded to `dtype`.
    """
    sums = matmul(inputs, params.input_kernel, dtype, params.bias)
    gates = matmul(inputs, params.gate_kernel, dtype, params.gate_bias)
    parts = [*jnp.split(sums, 4, axis=-1), *jnp.split(gates, 2, axis=-1)]
    q, k, v, o, i, f = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in parts)
    k, log_f = k / math.sqrt(k.shape[-1]), jax.nn.log_sigmoid(f)
    return q, k, v, jax.nn.sigmoid(o), i[..., 0], log_f[..., 0]


def step_mlstm(
    carry: MLSTMCarry, q: jax.Array, k: jax.Array, v: jax.Array, i: jax.Array, log_f: jax.Array
) -> tuple[MLSTMCarry, jax.Array]:
    """Return the next carry, and what is read from the memory, [batch, heads, d].

    q, k, v are [batch, heads, d], log i and log f [batch, heads].
    """
    f, i, stabilizer = stabilize(carry.stabilizer, i, log_f)
    written = i[..., None, None] * k[..., :, None] * v[..., None, :]
    memory = f[..., None, None] * carry.memory + written
    normalizer = f[..., None] * carry.normalizer + i[..., None] * k
    size = jnp.abs((q * normalizer).sum(-1))
    found = (q[..., None] * memory).sum(-2)
    found /= jnp.maximum(size, _exp_minus(stabilizer))[..., None]
    return MLSTMCarry(memory, normalizer, stabilizer), found


def stabilize(
    before: jax.Array, i: jax.Array, log_f: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return f exp(m - m'), i exp(-m') and m', from m (`before`), log i (`i`) and log f."""
    kept = log_f + before
    stabilizer = jnp.maximum(kept, i)
    return jnp.exp(kept - stabilizer), jnp.exp(i - stabilizer), stabilizer


def _scan(
    carry: MLSTMCarry, arrays: tuple[jax.Array, ...], reset: jax.Array | None
) -> tuple[MLSTMCarry, jax.Array]:
    """Run all steps, one after the other; see `_run_chunks`."""
    batch, heads, _, size = arrays[0].shape
    first = MLSTMCarry.zeros(batch, heads, size, arrays[0].dtype)

    def step(carry: MLSTMCarry, read: Any) -> tuple[MLSTMCarry, jax.Array]:
        arrays, mark = read
        if mark is not None:
            carry = jax.tree.map(
                lambda x, y: jnp.where(mark.reshape(-1, *[1] * (x.ndim - 1)), x, y), first, carry
            )
        return step_mlstm(carry, *arrays)

    steps = [jnp.moveaxis(x, 2, 0) for x in arrays], None if reset is None else reset.T
    carry, found = lax.scan(step, carry, steps)
    return carry, jnp.moveaxis(found, 0, 2)


def _run_chunks(
    carry: MLSTMCarry, arrays: tuple[jax.Array, ...], reset: jax.Array | None
) -> tuple[MLSTMCarry, jax.Array]:
    """Run all steps, in chunks; return the last carry, and what steps read from the memory.

    `arrays` are q, k, v [batch, heads, time, d], log i and log f [batch, heads, time]. Within a
    chunk, step t reads the memory before it and the values that steps s <= t write, with the
    weights D[t, s] (q_t . k_s), where log D[t, s] is log i_s plus the sum of log f_r over s < r <=
    t.
    """
    time = arrays[0].shape[2]
    chunk = min(max(time, 1), _CHUNK)

    def cut(x: jax.Array, filling: float = 0.0) -> jax.Array:
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


def _run_chunk(carry: MLSTMCarry, steps: tuple[Any, ...]) -> tuple[MLSTMCarry, jax.Array]:
    """Run a chunk: q, k, v [batch, heads, chunk, d], log i and log f [batch, heads, chunk].

    The last array is where the carry is reset, bool [batch, 1, chunk], or None. Return the next
    carry, and what each step reads from the memory, [batch, heads, chunk, d].
    """
    q, k, v, i, log_f, reset = steps
    since = jnp.cumsum(log_f, axis=-1)  # log f, summed from the start of the chunk to each step.
    past = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
    log_kept = since + carry.stabilizer[..., None]
    log_written = i + since[..., -1:] - since
    if reset is not None:  # A step reads what was written since the last reset.
        segment = jnp.cumsum(reset, axis=-1)
        past = past[None, None] & (segment[..., :, None] == segment[..., None, :])
        log_kept = jnp.where(segment > 0, NEVER, log_kept)
        log_written = jnp.where(segment == segment[..., -1:], log_written, NEVER)
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
