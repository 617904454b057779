"""Compare each regularizer with NumPy, and with the equations of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import models
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax import train_step
from references import assert_close, run_model


def make_rates(**rates: float) -> ConfigDict:
    """Return the `regularization` fields with some values changed."""
    fields = config_lib.default().regularization
    fields.update(rates)
    return fields


MODEL = model_lib.LanguageModel(vocabulary_size=40, embedding_size=50, hidden_size=60, num_layers=3)
DROPOUTS = ("input_dropout", "hidden_dropout", "output_dropout")


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_keep_the_expectation(rate: float) -> None:
    rates = make_rates(**dict.fromkeys(DROPOUTS, rate))
    masks = train_step.draw_masks(rates, MODEL, jax.random.key(0), 500)
    assert [mask.shape for mask in masks if mask is not None] == [
        (500, size) for size in (50, 60, 60, 60)
    ]
    for mask in masks:
        assert mask is not None
        np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-4)
        deviation = np.sqrt(rate / (1 - rate) / mask.size)
        assert abs(float(mask.mean()) - 1) < 5 * deviation
        # Each sequence of the batch and each layer has its own mask.
        assert (np.asarray(mask[0]) != np.asarray(mask[1])).any()
    assert (np.asarray(masks[1]) != np.asarray(masks[2])).any()


@pytest.mark.parametrize(("recurrence", "skip"), [("scan", False), ("auto", True)])
def test_locked_dropout_is_the_same_at_every_step(recurrence: str, skip: bool) -> None:
    """Compare with a model whose masks are constant over time."""
    model = model_lib.LanguageModel(11, 6, 9, 2, recurrence, skip_connections=skip)
    params = models.draw_params(model)
    rates = make_rates(**dict.fromkeys(DROPOUTS, 0.4))
    masks = train_step.draw_masks(rates, model, jax.random.key(1), 3)
    ids = np.random.default_rng(0).integers(0, 11, (3, 20))

    @jax.jit
    def predict(params: model_lib.Params) -> jax.Array:
        bound = model.bind({"params": params})
        outputs, _ = bound.run(jnp.asarray(ids), model.initial_carry(3), masks)
        logits: jax.Array = bound.predict(model_lib.apply_mask(outputs, masks[-1]))
        return logits

    expected, _ = run_model(params, ids, model.initial_carry(3), masks, skip)
    assert_close(predict(params), expected)


def test_embedding_dropout_drops_whole_tokens() -> None:
    params = models.draw_params(MODEL)
    rates = make_rates(embedding_dropout=0.3)
    dropped = train_step.drop_parameters(rates, params, jax.random.key(1))
    table, before = dropped["embedding"]["embedding"], params["embedding"]["embedding"]
    factors = np.asarray(table / before)
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), rtol=1e-5)
    np.testing.assert_allclose(np.unique(factors[:, 0].round(3)), [0, np.round(1 / 0.7, 3)])
    for name in ("lstm_0", "lstm_1", "dense"):
        assert dropped[name] is params[name]


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.9])
def test_weights_are_dropped_independently(rate: float) -> None:
    kernels = {name: jnp.full((301, 400), 3.0) for name in ("recurrent_kernel", "input_kernel")}
    rates = make_rates(recurrent_dropout=rate)
    params = {"lstm_0": kernels, "lstm_1": kernels}
    dropped = train_step.drop_parameters(rates, params, jax.random.key(2))
    mask, other = (
        np.asarray(layer["recurrent_kernel"], np.float64) * (1 - rate) / 3
        for layer in dropped.values()
    )
    np.testing.assert_allclose(np.unique(mask), [0, 1], atol=1e-4)
    assert (mask != other).any()
    assert all(layer["input_kernel"] is kernels["input_kernel"] for layer in dropped.values())

    def check_mean(numbers: np.ndarray, chance: float) -> None:
        deviation = np.sqrt(chance * (1 - chance) / numbers.size)
        assert abs(numbers.mean() - chance) < 5 * deviation

    check_mean(mask, 1 - rate)
    # Neighbors, and weights whose bits are of the same word.
    for first, second in (
        (mask[:, 1:], mask[:, :-1]),
        (mask[1:], mask[:-1]),
        (mask[:150], mask[151:]),
    ):
        check_mean(first * second, (1 - rate) ** 2)
