import math

import jax
import numpy as np
import pytest

from lstm_jax import evaluate
from lstm_jax import model as model_lib
from lstm_jax.model import LanguageModel


@pytest.mark.parametrize("length", [2, 600, 1025, 2500])
def test_equals_one_long_pass_that_counts_every_target_once(length: int) -> None:
    model = LanguageModel(11, 6, 9)
    params = jax.tree.map(lambda x: 3 * x, model_lib.init(model, jax.random.key(0)))
    ids = np.random.default_rng(0).integers(0, 11, length).astype(np.int32)
    output, _ = model_lib.apply(model, params, ids[None, :-1], model.initial_carry(1))
    logits = np.asarray(output[0], np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -log_probabilities[np.arange(length - 1), ids[1:]].mean()
    np.testing.assert_allclose(evaluate.mean_loss(model, params, ids), expected, rtol=1e-5)


def test_an_untrained_seed_model_is_as_good_as_guessing() -> None:
    model = LanguageModel(67, 256, 1024)
    params = model_lib.init(model, jax.random.key(0))
    ids = np.random.default_rng(0).integers(2, 67, 1024).astype(np.int32)
    loss = evaluate.mean_loss(model, params, ids)
    assert abs(loss - 4.20) < 0.03 and abs(loss - math.log(67)) < 0.03
