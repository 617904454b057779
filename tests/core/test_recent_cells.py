"""Compare the cells since 2000 with their papers' equations, in NumPy and float64.

The references share nothing with the cells: minGRU and minLSTM are computed with logarithms, as in
the code of their paper; sLSTM and mLSTM without a stabilizer, mLSTM as one sum over all steps.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lstm_jax import cells, ops
from lstm_jax.cells import rglru as rglru_lib
from lstm_jax.cells.block import Block
from lstm_jax.cells.making import make_cell
from lstm_jax.cells.protocol import run_cell
from test_cells import sigmoid

BATCH, TIME, INPUTS, HIDDEN, HEADS = 2, 9, 5, 8, 4

Arrays = dict[str, Any]


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def peephole(p: Arrays, x: np.ndarray) -> np.ndarray:
    h = c = np.zeros((len(x), HIDDEN))
    outputs = []
    for x_t in x.swapaxes(0, 1):
        i, f, g, o = np.split(x_t @ p["input_kernel"] + h @ p["recurrent_kernel"] + p["bias"], 4, 1)
        i, f = sigmoid(i + p["peepholes"][0] * c), sigmoid(f + p["peepholes"][1] * c)
        c = f * c + i * np.tanh(g)
        h = sigmoid(o + p["peepholes"][2] * c) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, 1)


def multiplicative(p: Arrays, x: np.ndarray) -> np.ndarray:
    h = c = np.zeros((len(x), HIDDEN))
    outputs = []
    for x_t in x.swapaxes(0, 1):
        m = (x_t @ p["input_factor"]) * (h @ p["hidden_factor"])
        i, f, g, o = np.split(x_t @ p["input_kernel"] + m @ p["recurrent_kernel"] + p["bias"], 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, 1)


def scan_in_logarithms(log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    """Return h_t = a_t h_(t-1) + b_t from h_0 = 0 (Heinsen 2023), for arrays [batch, time, n]."""
    total = np.cumsum(log_a, axis=1)
    return np.exp(total + np.logaddexp.accumulate(log_b - total, axis=1))


def log_g(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, np.log(np.maximum(x, 0) + 0.5), -softplus(-x))


def mingru(p: Arrays, x: np.ndarray) -> np.ndarray:
    z, n = np.split(x @ p["input_kernel"] + p["bias"], 2, axis=-1)
    return scan_in_logarithms(-softplus(z), -softplus(-z) + log_g(n))


def minlstm(p: Arrays, x: np.ndarray) -> np.ndarray:
    f, i, n = np.split(x @ p["input_kernel"] + p["bias"], 3, axis=-1)
    difference = softplus(-f) - softplus(-i)
    return scan_in_logarithms(-softplus(difference), -softplus(-difference) + log_g(n))


def rglru(p: Arrays, x: np.ndarray) -> np.ndarray:
    u = x @ p["input_kernel"] + p["bias"]
    r, i = np.split(sigmoid(u @ p["gate_kernel"] + p["gate_bias"]), 2, axis=-1)
    a = sigmoid(p["decay"]) ** (8 * r)
    h, outputs = np.zeros((len(x), HIDDEN)), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + np.sqrt(1 - a[:, t] ** 2) * i[:, t] * u[:, t]
        outputs.append(h)
    return np.stack(outputs, 1)


def paragru(p: Arrays, x: np.ndarray) -> np.ndarray:
    h, outputs = np.zeros((len(x), HIDDEN)), []
    for x_t in x.swapaxes(0, 1):
        r, z, n = np.split(x_t @ p["input_kernel"] + p["bias"], 3, axis=-1)
        scale_r, scale_z, scale_n = p["recurrent_scale"]
        r, z = sigmoid(r + scale_r * h), sigmoid(z + scale_z * h)
        h = (1 - z) * h + z * np.tanh(n + scale_n * r * h)
        outputs.append(h)
    return np.stack(outputs, 1)


def slstm(p: Arrays, x: np.ndarray) -> np.ndarray:
    c = n = h = np.zeros((len(x), HIDDEN))
    size, outputs = HIDDEN // HEADS, []
    for x_t in x.swapaxes(0, 1):
        sums = np.split(x_t @ p["input_kernel"] + p["bias"], 4, axis=1)
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            read = np.split(h[:, own] @ p["recurrent_kernel"][head], 4, axis=1)
            for gate, part in zip(sums, read, strict=True):
                gate[:, own] += part
        i, f, z, o = sums
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        outputs.append(h)
    return np.stack(outputs, 1)


def mlstm(p: Arrays, x: np.ndarray) -> np.ndarray:
    q, k, v, o = np.split(x @ p["input_kernel"] + p["bias"], 4, axis=-1)
    i, f = np.split(x @ p["gate_kernel"] + p["gate_bias"], 2, axis=-1)
    size, outputs = HIDDEN // HEADS, np.zeros_like(q)
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        for t in range(x.shape[1]):
            value, total = np.zeros((len(x), size)), np.zeros(len(x))
            for s in range(t + 1):
                kept = np.prod(sigmoid(f[:, s + 1 : t + 1, head]), axis=1)
                match = (q[:, t, own] * k[:, s, own]).sum(1) / np.sqrt(size)
                weight = kept * np.exp(i[:, s, head]) * match
                value += weight[:, None] * v[:, s, own]
                total += weight
            outputs[:, t, own] = value / np.maximum(np.abs(total), 1)[:, None]
    return sigmoid(o) * outputs


def block(p: Arrays, x: np.ndarray) -> np.ndarray:
    """Compute the block around a minGRU."""

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    x = x @ p["input_kernel"]
    padded = np.pad(norm(x) * p["cell_scale"], ((0, 0), (3, 0), (0, 0)))
    u = np.stack(
        [
            (padded[:, t : t + 4] * p["convolution"]).sum(1) + p["convolution_bias"]
            for t in range(x.shape[1])
        ],
        axis=1,
    )
    y = x + mingru(p["cell"], u)
    a, b = np.split((norm(y) * p["mlp_scale"]) @ p["mlp_kernel"], 2, axis=-1)
    gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    return y + (gelu * b) @ p["output_kernel"]


REFERENCES: dict[str, Callable[[Arrays, np.ndarray], np.ndarray]] = {
    "peephole": peephole,
    "multiplicative": multiplicative,
    "mingru": mingru,
    "minlstm": minlstm,
    "rglru": rglru,
    "paragru": paragru,
    "slstm": slstm,
    "mlstm": mlstm,
    "block": block,
}
N, H = INPUTS, HIDDEN
# The table in docs/cells.md.
PARAMETERS = {
    "peephole": 4 * H * (N + H + 1) + 3 * H,
    "multiplicative": 4 * H * (N + H + 1) + H * (N + H),
    "mingru": 2 * H * (N + 1),
    "minlstm": 3 * H * (N + 1),
    "rglru": H * (N + 1) + 2 * H * (H + 1) + H,
    "paragru": 3 * H * (N + 1) + 3 * H,
    "slstm": 4 * H * (N + H // HEADS + 1),
    "mlstm": 4 * H * (N + 1) + 2 * HEADS * (N + 1),
    "block": 6 * H**2 + 7 * H + N * H + 2 * H * (H + 1),
}


def make(name: str) -> Any:
    if name == "block":
        return Block(INPUTS, HIDDEN, make_cell(cells.CELLS["mingru"], HIDDEN, HIDDEN))
    return make_cell(cells.CELLS[name], INPUTS, HIDDEN)


def make_problem(cell: Any) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Return parameters in float64, inputs, and weights of the outputs in a loss."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(BATCH, TIME, INPUTS))
    carry = cell.initial_carry(BATCH)
    shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, jnp.asarray(inputs[:, 0]))
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), shapes["params"])
    return params, inputs, rng.normal(size=(BATCH, TIME, HIDDEN))


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_and_gradients_agree_with_the_paper(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lstm_jax.ops.matrix_lstm._CHUNK", 4)  # Three chunks, the last one partial.
    cell = make(name)
    params, inputs, weights = make_problem(cell)
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]
    expected = REFERENCES[name](params, inputs)
    assert np.abs(expected).max() > 0.1

    @jax.jit(static_argnums=1)
    @functools.partial(jax.grad, has_aux=True)
    def differentiate(params: Any, parallel: bool) -> tuple[jax.Array, jax.Array]:
        carry = jax.tree.map(lambda x: x.astype(float), cell.initial_carry(BATCH))
        _, outputs = cell.apply(
            {"params": params},
            carry,
            jnp.asarray(inputs),
            "auto" if parallel else "scan",
            method=run_cell,
        )
        return (outputs * weights).sum(), outputs

    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        raveled, unflatten = ravel_pytree(params)
        flat = np.asarray(raveled)
        for parallel in (False, True) if hasattr(cell, "run_parallel") else (False,):
            gradients, outputs = differentiate(params, parallel)
            np.testing.assert_allclose(outputs, expected, atol=1e-5)
            gradient = np.asarray(ravel_pytree(gradients)[0])
            for _ in range(5):
                step = 1e-5 * rng.standard_normal(flat.shape)
                above, below = (
                    (REFERENCES[name](jax.tree.map(np.asarray, unflatten(x)), inputs) * weights)
                    for x in map(jnp.asarray, (flat + step, flat - step))
                )
                numeric = (above.sum() - below.sum()) / 2
                np.testing.assert_allclose(gradient @ step, numeric, rtol=1e-5)


@pytest.mark.parametrize("name", ["slstm", "mlstm"])
def test_large_gates_stay_finite(name: str) -> None:
    cell = make(name)
    params, inputs, _ = make_problem(cell)
    bias = "bias" if name == "slstm" else "gate_bias"
    gates = 4 if name == "slstm" else 2

    @jax.jit(static_argnums=1)
    @jax.value_and_grad
    def run(given: Any, parallel: bool) -> jax.Array:
        carry, x = cell.initial_carry(BATCH), jnp.asarray(inputs, jnp.float32)
        outputs: Any = cell.apply(
            {"params": given}, carry, x, "auto" if parallel else "scan", method=run_cell
        )
        return outputs[1].sum()

    for i, f in ((200.0, 0.0), (-60.0, -200.0), (-60.0, 50.0), (-200.0, 0.0)):
        values = np.zeros((gates, len(params[bias]) // gates))
        values[:2] = np.array([[i], [f]])
        given = {**params, bias: values.ravel()}
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)
        for parallel in {False, name == "mlstm"}:
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(given, parallel)))


@pytest.mark.parametrize("heads", [2, 8])
def test_the_recurrent_kernel_of_each_head_is_orthogonal_at_first(heads: int) -> None:
    cell = make_cell(cells.CELLS["slstm"], INPUTS, 32, options={"heads": heads})
    carry, inputs = cell.initial_carry(1), jnp.zeros((1, INPUTS))
    kernels = cell.init(jax.random.key(0), carry, inputs)["params"]["recurrent_kernel"]
    for kernel in kernels:
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(32 // heads), atol=1e-5)


def test_the_decay_is_uniform_at_first() -> None:
    decay = 1 / (1 + np.exp(-np.asarray(rglru_lib._draw_decay(jax.random.key(0), (1000,))))) ** 8
    share = (decay - 0.9) / (0.999 - 0.9)
    assert share.min() >= -1e-4 and share.max() <= 1 + 1e-4
    np.testing.assert_allclose(np.sort(share), np.linspace(0, 1, 1000), atol=0.06)


@pytest.mark.parametrize("time", [1, 2, 13])
def test_both_ways_to_run_a_linear_recurrence_agree(time: int) -> None:
    rng = np.random.default_rng(time)
    a = rng.uniform(size=(3, time, 4))
    b, first = rng.normal(size=(3, time, 4)), rng.normal(size=(3, 4))
    expected, h = [], first
    for t in range(time):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    decays, terms, carry = (jnp.asarray(x, jnp.float32) for x in (a, b, first))
    for name in ("scan", "parallel"):
        after, got = ops.linear_scan(
            decays, terms, ops.HiddenCarry(carry), implementation=cast(Any, name)
        )
        np.testing.assert_allclose(got, np.stack(expected, 1), atol=1e-5)
        np.testing.assert_array_equal(after.hidden, got[:, -1])
