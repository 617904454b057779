"""Compare recorded activations with the equations in NumPy, in float64."""

from typing import Any

import jax
import numpy as np
import pytest

import models
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.inspect import activations
from test_cells import EQUATIONS, sigmoid

LENGTH = 1100  # Two chunks, the second partial.


def record(**fields: Any) -> tuple[Any, dict[str, Any], np.ndarray, activations.Reading]:
    model = model_lib.LanguageModel(11, 6, 9, **fields)
    # With larger recurrent kernels, rounding errors would grow from step to step.
    params = models.draw_params(model, 0.35)
    ids = np.random.default_rng(0).integers(0, 11, LENGTH).astype(np.int32)
    reading = activations.record_activations(model, params, ids)
    return model, jax.tree.map(lambda x: np.asarray(x, np.float64), params), ids, reading


def run_equations(
    params: dict[str, Any], cell: str, layers: int, ids: np.ndarray
) -> list[np.ndarray]:
    """Return inputs, hidden and cell states of each layer, each [time, features]."""
    inputs, seen = params["embedding"]["embedding"][ids], []
    for layer in range(layers):
        h = c = np.zeros((1, 9))
        states = []
        for x in inputs:
            h, c = EQUATIONS[cell](params[f"{cell}_{layer}"], x[None], h, c)
            states.append((h[0], c[0]))
        hidden, cells = (np.array(part) for part in zip(*states, strict=True))
        seen += [inputs, hidden, cells]
        inputs = hidden
    return seen


def compute_gate_inputs(
    p: dict[str, np.ndarray], inputs: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """Return the inputs of the gates before their nonlinearity, [time, gates * hidden]."""
    before = np.concatenate([np.zeros((1, 9)), hidden[:-1]])
    return inputs @ p["input_kernel"] + before @ p["recurrent_kernel"] + p["bias"]


def compute_saturation(gate: np.ndarray) -> np.ndarray:
    return np.stack([(gate < 0.1).mean(axis=0), (gate > 0.9).mean(axis=0)])


def test_an_lstm_of_two_layers() -> None:
    model, params, ids, reading = record(num_layers=2)
    x0, h0, c0, x1, h1, c1 = run_equations(params, "lstm", 2, ids)
    expected = np.tanh(np.concatenate([c0, c1], axis=1)).T
    np.testing.assert_allclose(reading.activations / 127, expected, atol=0.5 / 127 + 1e-4)

    for layer, (x, h) in enumerate([(x0, h0), (x1, h1)]):
        i, f, _, o = np.split(
            sigmoid(compute_gate_inputs(params[f"lstm_{layer}"], x, h)), 4, axis=1
        )
        assert set(reading.saturation[layer]) == {"input", "forget", "output"}
        for name, gate in {"input": i, "forget": f, "output": o}.items():
            # Rounding may move a gate across a threshold.
            np.testing.assert_allclose(
                reading.saturation[layer][name], compute_saturation(gate), atol=2 / LENGTH
            )

    logits = h1 @ params["dense"]["kernel"] + params["dense"]["bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1)[:, :5]
    best = np.take_along_axis(probabilities, order, axis=1)
    np.testing.assert_allclose(reading.probabilities, best, atol=1e-4)
    guessed = np.take_along_axis(probabilities, reading.guesses, axis=1)
    np.testing.assert_allclose(guessed, best, atol=1e-4)
    bits = -np.log2(probabilities[np.arange(LENGTH - 1), ids[1:]])
    assert reading.bits[0] == 0
    np.testing.assert_allclose(reading.bits[1:], bits, atol=2e-3)
    loss = loss_lib.compute_loss(model, jax.tree.map(np.float32, params), ids)
    assert reading.bits[1:].mean() * np.log(2) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("cell", ["gru", "rnn", "mogrifier"])
def test_other_cells(cell: str) -> None:
    _, params, ids, reading = record(cell=cell)
    x, hidden, cells = run_equations(params, cell, 1, ids)
    held = np.tanh(cells) if cell == "mogrifier" else hidden
    np.testing.assert_allclose(reading.activations / 127, held.T, atol=0.5 / 127 + 1e-3)
    (gates,) = reading.saturation
    names = {"gru": {"reset", "update"}, "rnn": set(), "mogrifier": {"input", "forget", "output"}}
    assert set(gates) == names[cell]
    if cell == "gru":
        r, z, _ = np.split(sigmoid(compute_gate_inputs(params["gru_0"], x, hidden)), 3, axis=1)
        np.testing.assert_allclose(gates["reset"], compute_saturation(r), atol=2 / LENGTH)
        np.testing.assert_allclose(gates["update"], compute_saturation(z), atol=2 / LENGTH)
