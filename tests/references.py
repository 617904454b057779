"""The equations of layers and models, which share nothing with the package, and how to compare.

JAX differentiates them, in float64 within `compute_exactly`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import ops
from lstm_jax.ops import LSTMParams, api, in_c
from lstm_jax.ops.gates import GRU, LSTM, PEEPHOLE_LSTM, RNN, Gating, Layer, Marks, expand

KINDS = (LSTM, PEEPHOLE_LSTM, GRU, RNN)
# (time, batch, features, hidden): one step, one text, parts of tiles and of registers, odd depths.
SIZES = [(1, 1, 9, 16), (17, 1, 8, 130), (33, 2, 129, 67), (7, 5, 33, 80), (5, 7, 9, 240)]
SIZES += [(6, 20, 48, 64), (3, 64, 130, 48)]

Arrays = dict[str, Any]
Array = jax.Array
sigmoid = jax.nn.sigmoid


def to_bfloat16(x: Any) -> Any:
    """Round numbers to bfloat16; keep their dtype."""
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _round_operand(x: Array) -> Array:
    return x + jax.lax.stop_gradient(to_bfloat16(x) - x)


_round_cotangent = jax.custom_vjp(lambda x: x)
_round_cotangent.defvjp(lambda x: (x, None), lambda _, cotangent: (to_bfloat16(cotangent),))


# Steps from x and the state, [batch, n] each, to the next state, which begins with h.


def project(p: Arrays, x: Array, h: Array, gates: int) -> tuple[list[Array], list[Array]]:
    """Return x W + b and h U of each gate, from operands in p["dtype"] if there is one."""
    w, u = p["input_kernel"], p["recurrent_kernel"]
    if p.get("dtype") == "bfloat16":
        x, w, h, u = map(_round_operand, (x, w, h, u))
        xs, hs = map(_round_cotangent, (x @ w, h @ u))
    else:
        xs, hs = x @ w, h @ u
    return jnp.split(xs + p["bias"], gates, 1), jnp.split(hs, gates, 1)


def lstm(p: Arrays, x: Array, h: Array, c: Array) -> tuple[Array, ...]:
    i, f, g, o = map(jnp.add, *project(p, x, h, 4))
    pi, pf, po = p.get("peepholes", np.zeros((3, 1)))
    c = sigmoid(f + pf * c) * c + sigmoid(i + pi * c) * jnp.tanh(g)
    return sigmoid(o + po * c) * jnp.tanh(c), c


def mogrifier(p: Arrays, x: Array, h: Array, c: Array) -> tuple[Array, ...]:
    for k in range(1, 6):
        if k % 2:
            x = 2 * sigmoid(h @ p[f"round_kernel_{k}"]) * x
        else:
            h = 2 * sigmoid(x @ p[f"round_kernel_{k}"]) * h
    return lstm(p, x, h, c)


def gru(p: Arrays, x: Array, h: Array) -> tuple[Array, ...]:
    (xr, xz, xn), (hr, hz, hn) = project(p, x, h, 3)
    n = jnp.tanh(xn + sigmoid(xr + hr) * (hn + p["recurrent_bias"]))
    z = sigmoid(xz + hz)
    return ((1 - z) * n + z * h,)


def rnn(p: Arrays, x: Array, h: Array) -> tuple[Array, ...]:
    (xs,), (hs,) = project(p, x, h, 1)
    return (jnp.tanh(xs + hs),)


STEPS: dict[str, Callable[..., tuple[Array, ...]]] = {
    **{name: lstm for name in ("lstm", "peephole", "peephole_lstm")},
    **{"mogrifier": mogrifier, "gru": gru, "rnn": rnn},
}


@jax.numpy_rank_promotion("allow")
def run_equations(
    gating: Gating, marks: Any, dtype: str, params: Any, inputs: Array, carry: Any
) -> Any:
    """Run a layer over time-major inputs; return outputs and the last carry.

    Steps read a carry of zeros, or leave it as it is, where `marks` is `in_c.RESET` or
    `in_c.FROZEN`. Operands of matmuls are rounded to `dtype`.
    """
    take_step = functools.partial(STEPS[gating.name], {**params._asdict(), "dtype": dtype})

    def step(state: Any, read: Any) -> Any:
        x, mark = read[0], read[1][:, None]
        after = take_step(x, *(jnp.where(mark == in_c.RESET, 0, s) for s in state))
        after = jax.tree.map(lambda s, a: jnp.where(mark == in_c.FROZEN, s, a), state, after)
        return after, after[0]

    marks = np.zeros(inputs.shape[:2], np.uint8) if marks is None else marks
    last, outputs = jax.lax.scan(step, carry[::-1], (inputs, marks))
    return outputs, gating.carry(*last[::-1])


@jax.numpy_rank_promotion("allow")
def run_model(
    params: Any, ids: np.ndarray, carry: Any, masks: Any = None, skip: bool = False
) -> tuple[Array, tuple[Any, ...]]:
    """Return logits and the last carry of a model of LSTMs, in float64.

    Masks, [batch, features], multiply the embeddings and the outputs of each layer.
    """
    layers, last = len(carry), []
    with jax.enable_x64():
        arrays = params, carry, masks or [np.ones((1, 1))] * (layers + 1)
        params, carry, masks = jax.tree.map(lambda x: jnp.asarray(x, "float64"), arrays)
        features = params["embedding"]["embedding"][ids.T]
        for i in range(layers):
            inputs, of_layer = features * masks[i], LSTMParams(**params[f"lstm_{i}"])
            outputs, after = run_equations(LSTM, None, "float32", of_layer, inputs, carry[i])
            features = outputs + features if skip and i else outputs
            last.append(after)
        features = (features * masks[-1]).swapaxes(0, 1)
        return features @ params["dense"]["kernel"] + params["dense"]["bias"], tuple(last)


def run_layer(
    name: str, backend: str, gating: Gating, marks: Any, dtype: str, *arguments: Any
) -> Any:
    """Run an implementation of the package as `run_equations` does, as on a kind of device."""
    pair = (None, None) if marks is None else (marks == in_c.RESET, marks == in_c.FROZEN)
    params, inputs, carry = arguments
    axis = int(backend != "cpu")
    layer = Layer(gating, dtype, axis, expand(params), inputs, carry, Marks(*pair))
    last, outputs = api.IMPLEMENTATIONS[name](layer)
    return outputs, last


def draw_layer(
    gating: Gating, sizes: tuple[int, ...], has_marks: bool = False
) -> tuple[tuple[Any, Array, Any], Any, Any]:
    """Return random parameters, inputs and a carry, marks or None, and cotangents of the results.

    Arrays are time-major. The cotangents of outputs are zero at frozen steps.
    """
    (time, batch, features, hidden), draw = sizes, np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(draw.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    columns = len(gating.of_inputs) * hidden
    arrays = [normal(features, columns), normal(hidden, columns), normal(columns)]
    arrays += {"gru": [normal(hidden)], "peephole_lstm": [normal(3, hidden)]}.get(gating.name, [])
    carry, d_last = (
        gating.carry(*(normal(batch, hidden) for _ in gating.carry._fields)) for _ in "ab"
    )
    inputs, d_outputs = (np.sqrt(time) * normal(time, batch, n) for n in (features, hidden))
    marks = None
    if has_marks:
        marks = jnp.asarray(draw.choice(3, (time, batch), p=[0.6, 0.2, 0.2]), jnp.uint8)
        d_outputs = jnp.where((marks == in_c.FROZEN)[:, :, None], 0, d_outputs)
    return (gating.params(*arrays), inputs, carry), marks, (d_outputs, d_last)


# Small arguments of every function of `ops`.
BATCH, TIME, FEATURES, HIDDEN, HEADS = 4, 6, 5, 16, 2
LENGTHS = np.array([6, 3, 0, 4])

# Every function, with the type of its parameters; `linear_scan` has none.
GATED: dict[str, Any] = {gating.name: gating.params for gating in KINDS}


def make_params(name: str) -> Any:
    """Draw parameters, no array of which is zero."""
    draw = np.random.default_rng(0)

    def perturb(x: jax.Array) -> jax.Array:
        return x + jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype)

    if name in GATED:
        return jax.tree.map(perturb, GATED[name].init(jax.random.key(0), FEATURES, HIDDEN))
    if name == "mlstm":
        shapes = (FEATURES, 4 * HIDDEN), (4 * HIDDEN,), (FEATURES, 2 * HEADS), (2 * HEADS,)
        return ops.MLSTMParams(*(perturb(jnp.zeros(shape)) for shape in shapes))
    return ()


def make_carry(name: str) -> Any:
    draw = np.random.default_rng(1)
    zeros: Any = ops.HiddenCarry.zeros(BATCH, HIDDEN)
    if name in ("lstm", "peephole_lstm"):
        zeros = ops.LSTMCarry.zeros(BATCH, HIDDEN)
    if name == "mlstm":
        zeros = ops.MLSTMCarry.zeros(BATCH, HEADS, HIDDEN // HEADS)
        zeros = zeros._replace(stabilizer=jnp.zeros_like(zeros.stabilizer))
    return jax.tree.map(lambda x: x + jnp.asarray(draw.uniform(0.1, 0.9, x.shape), x.dtype), zeros)


def make_inputs(name: str) -> jax.Array:
    draw = np.random.default_rng(2).normal(size=(BATCH, TIME, FEATURES))
    if name == "linear_scan":
        draw = np.random.default_rng(2).uniform(0.1, 0.9, size=(BATCH, TIME, 2 * HIDDEN))
    return jnp.asarray(draw, jnp.float32)


def value_and_gradients(function: Any, cotangents: Any, *arguments: Any) -> tuple[Any, Any]:
    @jax.jit
    def run(cotangents: Any, *arguments: Any) -> tuple[Any, Any]:
        outputs, pull_back = jax.vjp(function, *arguments)
        return outputs, pull_back(cotangents)

    result: tuple[Any, Any] = run(cotangents, *arguments)
    return result


def compute_exactly(function: Any, cotangents: Any, *arguments: Any) -> tuple[Any, Any]:
    """Return the outputs and gradients of a function in float64."""
    with jax.enable_x64():
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), (cotangents, *arguments))
        result: tuple[Any, Any] = jax.device_get(value_and_gradients(function, *arrays))
    return result


def measure_errors(actual: Any, expected: Any) -> float:
    """Return the largest relative error of an array in float32."""

    def measure(a: Array, e: np.ndarray) -> float:
        assert a.dtype == jnp.float32 and a.shape == e.shape
        return float(np.linalg.norm(a - e) / np.linalg.norm(e))

    return max(jax.tree.leaves(jax.tree.map(measure, actual, expected)))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that differences are within `tolerance` of the largest value, array by array."""

    def check(a: Any, e: Any) -> None:
        assert np.shape(a) == np.shape(e)
        bound = tolerance * max(float(np.abs(e).max(initial=0)), 1e-6)
        np.testing.assert_allclose(a, e, rtol=0, atol=bound)

    jax.tree.map(check, *jax.device_get((actual, expected)))


@jax.debug_nans(False)  # Its check of bfloat16 warns.
def check_layer(
    gating: Gating, sizes: tuple[int, ...], dtype: str, *implementations: tuple[str, str]
) -> None:
    """Compare results and gradients of implementations, each on a backend, with the equations."""
    (params, *others), marks, cotangents = draw_layer(gating, sizes, sizes[0] > 1)
    if dtype == "bfloat16":  # Only the library in C rounds biases.
        params = jax.tree.map(lambda x: to_bfloat16(x) if x.ndim == 1 else x, params)
    equations = functools.partial(run_equations, gating, marks, dtype)
    expected, gradients = compute_exactly(equations, cotangents, params, *others)
    for implementation in implementations:
        run = functools.partial(run_layer, *implementation, gating, marks, dtype)
        alone = jax.jit(run)(params, *others)  # Without derivatives.
        outputs, grads = value_and_gradients(run, cotangents, params, *others)
        # Without the rounding to bfloat16, outputs are further away.
        bound = 1e-5 if dtype == "float32" else 3e-4
        assert measure_errors((alone, outputs), (expected, expected)) < bound, implementation
        # Some implementations round other factors of the gradients.
        bound = 1e-5 if dtype == "float32" else 5e-3
        assert measure_errors(grads, gradients) < bound, implementation
