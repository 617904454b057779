"""Compare each cell with its equations in NumPy, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import cells, config, regularization
from lstm_jax import model as model_lib
from lstm_jax.cells.block import Block
from lstm_jax.cells.making import make_cell
from lstm_jax.errors import UserError
from lstm_jax.model import check_recurrence

BATCH, INPUTS, HIDDEN = 4, 5, 7


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normalize(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def lstm(p: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    xs, hs = x @ p["input_kernel"], h @ p["recurrent_kernel"]
    normalized = "cell_scale" in p
    if normalized:
        xs, hs = normalize(xs) * p["input_scale"], normalize(hs) * p["recurrent_scale"]
    i, f, g, o = np.split(xs + hs + p["bias"], 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    output_cell = normalize(c) * p["cell_scale"] + p["cell_bias"] if normalized else c
    return sigmoid(o) * np.tanh(output_cell), c


def mogrifier(p: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    for k in range(1, 6):
        kernel = p[f"round_kernel_{k}"]
        if k % 2:
            x = 2 * sigmoid(h @ kernel) * x
        else:
            h = 2 * sigmoid(x @ kernel) * h
    return lstm(p, x, h, c)


def gru(p: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    xs, hs = x @ p["input_kernel"], h @ p["recurrent_kernel"]
    if "input_scale" in p:
        xs, hs = normalize(xs) * p["input_scale"], normalize(hs) * p["recurrent_scale"]
    xr, xz, xn = np.split(xs + p["bias"], 3, axis=1)
    hr, hz, hn = np.split(hs, 3, axis=1)
    n = np.tanh(xn + sigmoid(xr + hr) * (hn + p["recurrent_bias"]))
    z = sigmoid(xz + hz)
    return (1 - z) * n + z * h, c


def rnn(p: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    xs, hs = x @ p["input_kernel"], h @ p["recurrent_kernel"]
    if "input_scale" in p:
        xs, hs = normalize(xs) * p["input_scale"], normalize(hs) * p["recurrent_scale"]
    return np.tanh(xs + hs + p["bias"]), c


EQUATIONS = {"lstm": lstm, "mogrifier": mogrifier, "gru": gru, "rnn": rnn}


def count_parameters(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_step_agrees_with_the_equations(name: str, layer_norm: bool) -> None:
    cell = cells.CELLS[name](INPUTS, HIDDEN, "float32", layer_norm)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    carry = jax.tree.map(lambda x: normal(*x.shape), cell.initial_carry(BATCH))
    inputs = normal(BATCH, INPUTS)
    shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, inputs)["params"]
    params = jax.tree.map(lambda x: 0.5 * normal(*x.shape), shapes)
    last, outputs = jax.jit(cell.apply)({"params": params}, carry, inputs)
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    before = np.asarray(getattr(carry, "cell", carry.hidden), np.float64)
    hidden = np.asarray(carry.hidden, np.float64)
    h, c = EQUATIONS[name](p, np.asarray(inputs, np.float64), hidden, before)
    np.testing.assert_allclose(outputs, h, atol=1e-5)
    np.testing.assert_array_equal(outputs, last.hidden)
    if hasattr(last, "cell"):
        np.testing.assert_allclose(last.cell, c, atol=1e-5)

    # The table in docs/cells.md.
    n, h_ = INPUTS, HIDDEN
    gates = {"lstm": 4, "mogrifier": 4, "gru": 3, "rnn": 1}[name]
    expected = gates * h_ * (n + h_ + 1)
    expected += {"lstm": 0, "mogrifier": 5 * n * h_, "gru": h_, "rnn": 0}[name]
    if layer_norm:
        expected += 2 * gates * h_ + (2 * h_ if gates == 4 else 0)
    assert count_parameters(params) == expected


@pytest.mark.parametrize("name", cells.CELLS)
def test_an_initial_carry_can_be_donated(name: str) -> None:
    cell = make_cell(cells.CELLS[name], 8, 8)
    arrays = jax.tree.leaves(Block(8, 8, cell).initial_carry(2))
    buffers = {array.unsafe_buffer_pointer() for array in arrays}
    assert len(buffers) == len(arrays)  # No two arrays share one.


@pytest.mark.parametrize(
    ("name", "layer_norm"), [("lstm", True), ("mogrifier", False), ("gru", True), ("rnn", False)]
)
def test_every_cell_gives_the_same_logits_token_by_token(name: str, layer_norm: bool) -> None:
    model = model_lib.LanguageModel(
        11, 6, 9, 2, cell=name, layer_norm=layer_norm, tie_embeddings=True
    )
    params = models.draw_params(model)
    assert "kernel" not in params["dense"]
    ids = np.random.default_rng(0).integers(0, 11, (3, 8))
    logits, last = models.apply(model, params, ids, model.initial_carry(3))
    step = jax.jit(functools.partial(model.apply_step, model.prepare_step(params)))
    carry = model.initial_carry(3)
    for t in range(8):
        one, carry = step(ids[:, t], carry)
        np.testing.assert_allclose(one, logits[:, t], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carry, last)


# `check_cell` compares a scan with the parallel form of those that have one.
@pytest.mark.parametrize(
    ("name", "block"), [("peephole", "none"), ("slstm", "none"), ("slstm", "residual")]
)
def test_every_execution_gives_the_same_logits(name: str, block: str) -> None:
    scan = model_lib.LanguageModel(11, 4, 8, 2, "scan", cell=name, block=block)
    parallel = scan.clone(recurrence="parallel")
    params = models.draw_params(scan)
    ids, carry = np.random.default_rng(0).integers(0, 11, (3, 8)), scan.initial_carry(3)
    logits, last = models.apply(scan, params, ids, carry)
    step = jax.jit(functools.partial(scan.apply_step, scan.prepare_step(params)))
    for t in range(8):
        one, carry = step(ids[:, t], carry)
        np.testing.assert_allclose(one, logits[:, t], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carry, last)
    if block == "none" and name == "slstm":
        with pytest.raises(ValueError, match="needs a cell with a method run_parallel"):
            check_recurrence(parallel)
    else:
        other, _ = models.apply(parallel, params, ids, parallel.initial_carry(3))
        np.testing.assert_allclose(other, logits, atol=1e-5)


class OwnLSTMCell(cells.LSTMCell):
    """A cell with other equations, for which `ops.lstm` is wrong."""

    def gates(self, carry: Any, inputs: jax.Array) -> Any:
        """Return the gates of a step, of which the output gate is open."""
        return {**super().gates(carry, inputs), "output": jnp.ones_like(carry.hidden)}


def test_only_cells_with_the_equations_of_a_layer_run_as_one() -> None:
    for name in ("lstm", "peephole", "gru", "rnn"):
        assert model_lib.LanguageModel(11, 6, 9, cell=name).runs_gated_layers
    assert not model_lib.LanguageModel(11, 6, 9, cell="mogrifier").runs_gated_layers
    normalized = model_lib.LanguageModel(11, 6, 9, layer_norm=True, recurrence="xla")
    with pytest.raises(ValueError, match="only the cells lstm, .* without layer normalization"):
        check_recurrence(normalized)
    own = model_lib.LanguageModel(11, 6, 9, cell=OwnLSTMCell)
    params, ids = models.draw_params(own), np.zeros((2, 5), np.int32)
    both = (own.clone(recurrence=name) for name in ("auto", "scan"))
    first, second = (models.apply(x, params, ids, x.initial_carry(2))[0] for x in both)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, "none") for name in cells.CELLS] + [("lstm", "residual"), ("mingru", "residual")],
)
def test_no_cell_ignores_layer_norm_or_recurrent_dropout(name: str, block: str) -> None:
    model = model_lib.LanguageModel(11, 6, 8, cell=name, block=block)
    plain = models.draw_params(model)
    normalized = model.clone(layer_norm=True)
    if name in ("lstm", "peephole", "mogrifier", "multiplicative", "gru", "rnn"):
        assert count_parameters(models.draw_params(normalized)) > count_parameters(plain)
    else:
        with pytest.raises(UserError, match="has no field layer_norm"):
            models.draw_params(normalized)
    rates = config.default().regularization
    rates.recurrent_dropout = 0.5
    if name in ("minlstm", "mingru", "rglru", "paragru", "mlstm"):
        with pytest.raises(UserError, match="needs a cell with a parameter recurrent_kernel"):
            regularization.drop_parameters(rates, plain, jax.random.key(0))
        return
    dropped = regularization.drop_parameters(rates, plain, jax.random.key(0))
    ids, carry = np.arange(8)[None], model.initial_carry(1)
    outputs = [models.apply(model, params, ids, carry)[0] for params in (plain, dropped)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4


def test_the_table_of_cells_is_read_only() -> None:
    with pytest.raises(TypeError):
        cells.CELLS["peephole"] = cells.LSTMCell  # type: ignore[index]
