"""Compare the model with its equations, and its sizes and initial values with Keras's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import model as model_lib
from lstm_jax.model import LanguageModel
from lstm_jax.ops import LSTMCarry
from lstm_jax.run import messages
from references import assert_close, compute_exactly, run_model, value_and_gradients


def make_random_carry(key: jax.Array, model: LanguageModel, batch: int) -> model_lib.Carry:
    keys = jax.random.split(key, 2 * model.num_layers)
    arrays = [jax.random.normal(k, (batch, model.hidden_size)) for k in keys]
    return tuple(map(LSTMCarry, arrays[::2], arrays[1::2]))


# A small vocabulary is folded into the recurrence; a large one is looked up.
@pytest.mark.parametrize(
    ("embedding_size", "num_layers", "skip", "recurrence"),
    [(6, 1, False, "auto"), (8, 3, True, "auto"), (6, 3, True, "scan")],
)
def test_agrees_with_the_equations_at_once_and_token_by_token(
    embedding_size: int, num_layers: int, skip: bool, recurrence: str
) -> None:
    model = LanguageModel(11, embedding_size, 9, num_layers, recurrence, skip_connections=skip)
    params = models.draw_params(model, 0.5)
    ids = np.random.default_rng(0).integers(0, 11, (3, 20))
    carry = make_random_carry(jax.random.key(2), model, 3)
    logits, last = results = models.apply(model, params, ids, carry)
    weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), results)
    apply = functools.partial(model_lib.apply, model)
    equations = functools.partial(run_model, skip=skip)
    actual = value_and_gradients(lambda p, c: apply(p, ids, c), weights, params, carry)
    expected = compute_exactly(lambda p, c: equations(p, ids, c), weights, params, carry)
    assert_close(actual, expected)
    step = jax.jit(functools.partial(model.apply_step, model.prepare_step(params)))
    for t in range(20):
        one, carry = step(ids[:, t], carry)
        np.testing.assert_allclose(one, logits[:, t], atol=1e-5)
    assert_close(carry, last)


def test_the_seed_model_has_5332803_parameters_in_three_groups() -> None:
    model = LanguageModel(67, 256, 1024)
    params = model_lib.get_param_shapes(model)
    counts = {
        part: sum(int(np.prod(array.shape)) for array in jax.tree.leaves(arrays))
        for part, arrays in params.items()
    }
    assert counts == {"embedding": 17_152, "lstm_0": 5_246_976, "dense": 68_675}
    table = messages.format_parameters(params)
    assert "5,332,803" in table.splitlines()[-1]
    assert [line.split()[0] for line in table.splitlines() if not line.startswith(" ")] == [
        "embedding",
        "lstm_0",
        "dense",
        "total",
    ]


def test_the_initial_bias_is_the_logarithm_of_the_frequencies() -> None:
    counts = np.array([0, 0, 1, 2, 4])
    params = model_lib.init_params(LanguageModel(5, 4, 4), jax.random.key(0), counts)
    np.testing.assert_allclose(np.exp(params["dense"]["bias"]), (counts + 1) / 12, rtol=1e-6)
    zeros = LanguageModel(5, 4, 4, initial_bias="zeros")
    assert not model_lib.init_params(zeros, jax.random.key(0), counts)["dense"]["bias"].any()


def test_initialized_as_keras_does() -> None:
    model = LanguageModel(67, 40, 64)
    params = model_lib.init_params(model, jax.random.key(3))
    embedding = np.asarray(params["embedding"]["embedding"])
    assert -0.05 <= embedding.min() < -0.045 and 0.045 < embedding.max() <= 0.05
    wide = model_lib.init_params(
        LanguageModel(67, 40, 64, initial_embedding=0.5), jax.random.key(3)
    )
    np.testing.assert_allclose(wide["embedding"]["embedding"], 10 * embedding, atol=1e-7)
    lstm = params["lstm_0"]
    limit = np.sqrt(6 / (40 + 4 * 64))
    assert 0.98 * limit < np.abs(lstm["input_kernel"]).max() <= limit
    limit = np.sqrt(6 / (64 + 67))
    assert 0.95 * limit < np.abs(params["dense"]["kernel"]).max() <= limit
    kernel = np.asarray(lstm["recurrent_kernel"])
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(64), atol=1e-5)
    bias = np.asarray(lstm["bias"]).reshape(4, 64)
    np.testing.assert_array_equal(bias, np.array([0, 1, 0, 0])[:, None] * np.ones(64))
    assert not np.asarray(params["dense"]["bias"]).any()


@pytest.mark.parametrize("cell", ["lstm", "gru", "minlstm", "mlstm"])
def test_a_carry_of_another_batch_size_is_an_error(cell: str) -> None:
    model = LanguageModel(11, 8, 16, cell=cell)
    params, ids = models.draw_params(model), np.zeros((4, 5), np.int32)
    with pytest.raises(ValueError, match=r"carry\.\w+ is float32 .*: it must be float \[batch "):
        model_lib.apply(model, params, ids, model.initial_carry(1))
