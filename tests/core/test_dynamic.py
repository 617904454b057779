"""Compare dynamic evaluation with the updates of its paper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import dynamic
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib

MODEL = model_lib.LanguageModel(11, 6, 9, 2)
SETTINGS = dynamic.Settings(learning_rate=0.01, decay=0.05, segment_length=7, epsilon=0.2)
TRAIN_IDS = np.random.default_rng(3).integers(0, 11, 42).astype(np.int32)


@pytest.fixture(scope="module")
def params() -> model_lib.Params:
    return models.draw_params(MODEL)


@pytest.fixture(scope="module")
def sizes(params: model_lib.Params) -> model_lib.Params:
    return dynamic.measure_gradient_sizes(MODEL, params, TRAIN_IDS, 7)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def differentiate(p: model_lib.Params, carry: model_lib.Carry, x: Any, y: Any) -> Any:
    logits, carry = model_lib.apply(MODEL, p, x[None], carry)
    losses = -jax.nn.log_softmax(logits[0])[jnp.arange(len(y)), y]
    return losses.mean(), (losses, carry)


def test_gradients_are_measured_on_the_segments_of_the_training_text(
    params: model_lib.Params, sizes: model_lib.Params
) -> None:
    carry, sums = MODEL.initial_carry(1), jax.tree.map(np.zeros_like, params)
    for start in range(0, 35, 7):  # A partial last segment is left out.
        x, y = TRAIN_IDS[start : start + 7], TRAIN_IDS[start + 1 : start + 8]
        grads, (_, carry) = differentiate(params, carry, x, y)
        sums = jax.tree.map(lambda s, g: s + np.asarray(g) ** 2, sums, grads)
    jax.tree.map(
        lambda size, s: np.testing.assert_allclose(size, np.sqrt(s / 5), rtol=1e-3, atol=1e-7),
        sizes,
        sums,
    )


def test_updates_match_those_of_the_paper(
    params: model_lib.Params, sizes: model_lib.Params
) -> None:
    ids = np.random.default_rng(1).integers(0, 11, 300).astype(np.int32)  # More than one call.
    adapted, carry, expected = params, MODEL.initial_carry(1), []
    mean = np.concatenate([np.ravel(size) for size in jax.tree.leaves(sizes)]).mean()
    for start in range(0, 299, 7):
        x, y = ids[:-1][start : start + 7], ids[1:][start : start + 7]
        grads, (losses, carry) = differentiate(adapted, carry, x, y)
        expected.append(losses)
        adapted = jax.tree.map(
            lambda p, g, p0, s: (
                p - 0.01 * g / (s + 0.2 * mean) + np.minimum(0.05 * s / mean, 1) * (p0 - p)
            ),
            adapted,
            grads,
            params,
            sizes,
        )
    actual = dynamic.compute_dynamic_losses(MODEL, params, ids, SETTINGS, sizes)
    np.testing.assert_allclose(actual, np.concatenate(expected), atol=1e-5)


def test_a_segment_of_the_whole_text_is_only_predicted(
    params: model_lib.Params, sizes: model_lib.Params
) -> None:
    ids = np.random.default_rng(1).integers(0, 11, 40).astype(np.int32)
    expected = loss_lib.compute_token_losses(MODEL, params, ids)
    for length in (39, 10**9):
        settings = SETTINGS._replace(segment_length=length)
        actual = dynamic.compute_dynamic_losses(MODEL, params, ids, settings, sizes)
        np.testing.assert_allclose(actual, expected, atol=1e-6)
