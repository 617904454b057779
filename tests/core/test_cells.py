"""Compare each cell with its paper's equations, in float64.

The references share nothing with the cells: minGRU and minLSTM are computed with logarithms, as in
the code of their paper; sLSTM and mLSTM without a stabilizer, mLSTM as one sum over all steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import cells, config, train_step
from lstm_jax import model as model_lib
from lstm_jax.cells import rglru as rglru_lib
from lstm_jax.cells.base import make_cell, run_cell
from lstm_jax.cells.block import Block
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.errors import UserError
from references import STEPS, Array, Arrays, assert_close, compute_exactly, lstm, sigmoid

BATCH, TIME, INPUTS, HIDDEN, HEADS = 2, 9, 5, 8, 4

softplus = jax.nn.softplus


def multiplicative(p: Arrays, x: Array, h: Array, c: Array) -> tuple[Array, ...]:
    return lstm(p, x, (x @ p["input_factor"]) * (h @ p["hidden_factor"]), c)


def rglru(p: Arrays, x: Array, h: Array) -> tuple[Array, ...]:
    u = x @ p["input_kernel"] + p["bias"]
    r, i = jnp.split(sigmoid(u @ p["gate_kernel"] + p["gate_bias"]), 2, axis=-1)
    a = sigmoid(p["decay"]) ** (8 * r)
    return (a * h + jnp.sqrt(1 - a**2) * i * u,)


def slstm(p: Arrays, x: Array, h: Array, c: Array, n: Array) -> tuple[Array, ...]:
    heads = h.reshape(len(h), HEADS, -1)
    read = jnp.split(jnp.einsum("bhi,hio->bho", heads, p["recurrent_kernel"]), 4, axis=2)
    sums = jnp.split(x @ p["input_kernel"] + p["bias"], 4, axis=1)
    i, f, z, o = (one + other.reshape(h.shape) for one, other in zip(sums, read, strict=True))
    c, n = sigmoid(f) * c + jnp.exp(i) * jnp.tanh(z), sigmoid(f) * n + jnp.exp(i)
    return sigmoid(o) * c / n, c, n


def over_time(step: Callable[..., tuple[Array, ...]], states: int) -> Callable[..., Array]:
    def run(p: Arrays, x: Array) -> Array:
        def take_step(state: Any, x_t: Array) -> tuple[Any, Array]:
            after = step(p, x_t, *state)
            return after, after[0]

        first = (jnp.zeros((len(x), HIDDEN)),) * states
        return jax.lax.scan(take_step, first, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return run


# All steps at once.


def scan_in_logarithms(log_a: Array, log_b: Array) -> Array:
    """Return h_t = a_t h_(t-1) + b_t from h_0 = 0 (Heinsen 2023), for arrays [batch, time, n]."""
    total = jnp.cumsum(log_a, axis=1)
    return jnp.exp(total + jax.lax.cumlogsumexp(log_b - total, axis=1))


def log_g(x: Array) -> Array:
    return jnp.where(x >= 0, jnp.log(jnp.maximum(x, 0) + 0.5), -softplus(-x))


def mingru(p: Arrays, x: Array) -> Array:
    z, n = jnp.split(x @ p["input_kernel"] + p["bias"], 2, axis=-1)
    return scan_in_logarithms(-softplus(z), -softplus(-z) + log_g(n))


def minlstm(p: Arrays, x: Array) -> Array:
    f, i, n = jnp.split(x @ p["input_kernel"] + p["bias"], 3, axis=-1)
    difference = softplus(-f) - softplus(-i)
    return scan_in_logarithms(-softplus(difference), -softplus(-difference) + log_g(n))


def mlstm(p: Arrays, x: Array) -> Array:
    *qkv, o = jnp.split(x @ p["input_kernel"] + p["bias"], 4, axis=-1)
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in qkv)
    i, f = jnp.split(x @ p["gate_kernel"] + p["gate_bias"], 2, axis=-1)
    total = jnp.cumsum(jax.nn.log_sigmoid(f), axis=1)
    log_weights = total[:, :, None] - total[:, None] + i[:, None]  # Of step s at t, [b, t, s, h].
    match = jnp.einsum("bthd,bshd->btsh", q, k) / np.sqrt(HIDDEN // HEADS)
    weights = jnp.exp(log_weights) * match * jnp.tri(x.shape[1])[:, :, None]
    value, norm = jnp.einsum("btsh,bshd->bthd", weights, v), jnp.abs(weights.sum(2))
    return sigmoid(o) * (value / jnp.maximum(norm, 1)[..., None]).reshape(o.shape)


def block(p: Arrays, x: Array) -> Array:
    """Compute the block around a minGRU."""

    def norm(x: Array) -> Array:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    x = x @ p["input_kernel"]
    padded = jnp.pad(norm(x) * p["cell_scale"], ((0, 0), (3, 0), (0, 0)))
    parts = [(padded[:, t : t + 4] * p["convolution"]).sum(1) for t in range(x.shape[1])]
    y = x + mingru(p["cell"], jnp.stack(parts, axis=1) + p["convolution_bias"])
    a, b = jnp.split((norm(y) * p["mlp_scale"]) @ p["mlp_kernel"], 2, axis=-1)
    gelu = 0.5 * a * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    return y + (gelu * b) @ p["output_kernel"]


REFERENCES: dict[str, Callable[[Arrays, Array], Array]] = {
    **{name: over_time(STEPS[name], 2) for name in ("lstm", "peephole", "mogrifier")},
    "multiplicative": over_time(multiplicative, 2),
    **{name: over_time(STEPS[name], 1) for name in ("gru", "rnn")},
    "rglru": over_time(rglru, 1),
    "slstm": over_time(slstm, 3),
    "minlstm": minlstm,
    "mingru": mingru,
    "mlstm": mlstm,
    "block": block,
}


def make(name: str) -> Any:
    if name == "block":
        return Block(INPUTS, HIDDEN, make_cell(cells.import_cell("mingru"), HIDDEN, HIDDEN))
    return make_cell(cells.import_cell(name), INPUTS, HIDDEN)


def make_problem(cell: Any) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Return parameters, inputs and cotangents of the outputs, in float64."""
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
    monkeypatch.setattr("lstm_jax.ops.scans._CHUNK", 4)  # Three chunks, the last one partial.
    cell = make(name)
    params, inputs, weights = make_problem(cell)
    with jax.numpy_rank_promotion("allow"):
        expected = compute_exactly(REFERENCES[name], weights, params, inputs)
    assert np.abs(expected[0]).max() > 0.1
    for implementation in ("scan", "auto") if hasattr(cell, "run_parallel") else ("scan",):

        def run(params: Any, inputs: Any, implementation: str = implementation) -> jax.Array:
            carry = jax.tree.map(lambda x: x.astype(float), cell.initial_carry(BATCH))
            arguments = carry, inputs, None, implementation
            _, outputs = cell.apply({"params": params}, *arguments, method=run_cell)
            return jnp.asarray(outputs)

        assert_close(compute_exactly(run, weights, params, inputs), expected)


@pytest.mark.parametrize("name", ["slstm", "mlstm"])
def test_large_gates_stay_finite(name: str) -> None:
    cell = make(name)
    params, inputs, _ = make_problem(cell)
    bias = "bias" if name == "slstm" else "gate_bias"
    gates = 4 if name == "slstm" else 2

    @jax.jit(static_argnums=1)
    @jax.value_and_grad
    def run(arrays: Any, implementation: str) -> jax.Array:
        carry, x = cell.initial_carry(BATCH), jnp.asarray(inputs, jnp.float32)
        arguments = carry, x, None, implementation
        outputs: Any = cell.apply({"params": arrays}, *arguments, method=run_cell)
        return outputs[1].sum()

    for i, f in ((200.0, 0.0), (-60.0, -200.0), (-60.0, 50.0), (-200.0, 0.0)):
        values = np.zeros((gates, len(params[bias]) // gates))
        values[:2] = np.array([[i], [f]])
        arrays = {**params, bias: values.ravel()}
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
        for implementation in ("scan", "auto")[: 2 if name == "mlstm" else 1]:
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(arrays, implementation)))


@pytest.mark.parametrize("heads", [2, 8])
def test_the_recurrent_kernel_of_each_head_is_orthogonal_at_first(heads: int) -> None:
    cell = make_cell(cells.import_cell("slstm"), INPUTS, 32, options={"heads": heads})
    carry, inputs = cell.initial_carry(1), jnp.zeros((1, INPUTS))
    kernels = cell.init(jax.random.key(0), carry, inputs)["params"]["recurrent_kernel"]
    for kernel in kernels:
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(32 // heads), atol=1e-5)


def test_the_decay_is_uniform_at_first() -> None:
    decay = 1 / (1 + np.exp(-np.asarray(rglru_lib._draw_decay(jax.random.key(0), (1000,))))) ** 8
    share = (decay - 0.9) / (0.999 - 0.9)
    assert share.min() >= -1e-4 and share.max() <= 1 + 1e-4
    np.testing.assert_allclose(np.sort(share), np.linspace(0, 1, 1000), atol=0.06)


@pytest.mark.parametrize("name", cells.CELLS)
def test_an_initial_carry_can_be_donated(name: str) -> None:
    cell = make_cell(cells.import_cell(name), 8, 8)
    arrays = jax.tree.leaves(Block(8, 8, cell).initial_carry(2))
    buffers = {array.unsafe_buffer_pointer() for array in arrays}
    assert len(buffers) == len(arrays)  # No two arrays share one.


class OwnLSTMCell(LSTMCell):
    """A cell with other equations, for which `ops.lstm` is wrong."""

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        """Return the next carry and the outputs, with the output gate open."""
        carry, _ = super().__call__(carry, inputs)
        return carry._replace(hidden=jnp.tanh(carry.cell)), jnp.tanh(carry.cell)


def test_only_cells_with_the_equations_of_a_layer_run_as_one() -> None:
    for name in ("lstm", "peephole", "gru", "rnn"):
        assert model_lib.LanguageModel(11, 6, 9, cell=name).gating
    assert not model_lib.LanguageModel(11, 6, 9, cell="mogrifier").gating
    block = config.ModelConfig(block="residual", recurrence="xla")
    with pytest.raises(UserError, match="only the cells lstm, .* without a block"):
        model_lib.make_model(block, 11)
    own = model_lib.LanguageModel(11, 6, 9, cell=OwnLSTMCell)
    params, ids = models.draw_params(own), np.zeros((2, 5), np.int32)
    both = (own.clone(recurrence=name) for name in ("auto", "scan"))
    first, second = (models.apply(x, params, ids, x.initial_carry(2))[0] for x in both)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, "none") for name in cells.CELLS] + [("lstm", "residual"), ("mingru", "residual")],
)
def test_no_cell_ignores_recurrent_dropout(name: str, block: str) -> None:
    model = model_lib.LanguageModel(11, 6, 8, cell=name, block=block)
    plain = models.draw_params(model)
    rates = config.default().regularization
    rates.recurrent_dropout = 0.5
    if name in ("minlstm", "mingru", "rglru", "mlstm"):
        with pytest.raises(UserError, match="needs a cell with a parameter recurrent_kernel"):
            train_step.drop_parameters(rates, plain, jax.random.key(0))
        return
    dropped = train_step.drop_parameters(rates, plain, jax.random.key(0))
    ids, carry = np.arange(8)[None], model.initial_carry(1)
    outputs = [models.apply(model, params, ids, carry)[0] for params in (plain, dropped)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4
