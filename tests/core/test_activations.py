"""Compare recorded activations with the equations, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import model as model_lib
from lstm_jax.export import page
from references import STEPS

LENGTH = 1100  # Two chunks, the second partial.


@pytest.mark.parametrize(("cell", "layers"), [("lstm", 2), ("gru", 1), ("rnn", 1)])
def test_a_record_equals_the_equations(cell: str, layers: int) -> None:
    model = model_lib.LanguageModel(11, 6, 9, cell=cell, num_layers=layers)
    # With larger recurrent kernels, rounding errors would grow from step to step.
    float32 = models.draw_params(model, 0.35)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), float32)
    ids = np.random.default_rng(0).integers(0, 11, LENGTH).astype(np.int32)
    reading = page.record_activations(model, float32, ids)

    inputs, expected = params["embedding"]["embedding"][ids], []
    for layer in range(layers):
        p, take_step = params[f"{cell}_{layer}"], STEPS[cell]

        def step(state: Any, x: Any, p: Any = p, take_step: Any = take_step) -> Any:
            after = take_step(p, x[None], *state)
            return after, after

        with jax.enable_x64():
            first = (jnp.zeros((1, 9)),) * (1 if cell in ("gru", "rnn") else 2)
            _, states = jax.lax.scan(step, first, inputs)
        inputs, *cells = (np.asarray(x[:, 0]) for x in states)
        expected.append(np.tanh(cells[0]) if cells else inputs)
    values = np.concatenate(expected, axis=1)
    np.testing.assert_allclose(reading.activations / 127, values, atol=0.5 / 127 + 1e-3)

    logits = inputs @ params["dense"]["kernel"] + params["dense"]["bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = -np.sort(-probabilities, axis=1)[:, :5]
    np.testing.assert_allclose(reading.probabilities, best, atol=1e-3)
    guessed = np.take_along_axis(probabilities, reading.guesses, axis=1)
    np.testing.assert_allclose(guessed, best, atol=1e-3)
    bits = -np.log2(probabilities[np.arange(LENGTH - 1), ids[1:]])
    assert reading.bits[0] == 0
    np.testing.assert_allclose(reading.bits[1:], bits, atol=1e-2)
