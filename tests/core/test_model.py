"""Compare the model with its equations, gradients with finite differences, and sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import models
from lstm_jax import model as model_lib
from lstm_jax.model import LanguageModel
from lstm_jax.ops import LSTMCarry
from lstm_jax.run import messages
from references import assert_close, run_model


def make_random_carry(key: jax.Array, model: LanguageModel, batch: int) -> model_lib.Carry:
    keys = jax.random.split(key, 2 * model.num_layers)
    arrays = [jax.random.normal(k, (batch, model.hidden_size)) for k in keys]
    return tuple(map(LSTMCarry, arrays[::2], arrays[1::2]))


@pytest.mark.parametrize(
    ("num_layers", "skip", "recurrence"), [(1, False, "auto"), (3, True, "auto"), (3, True, "scan")]
)
def test_agrees_with_the_equations_at_once_and_token_by_token(
    num_layers: int, skip: bool, recurrence: str
) -> None:
    model = LanguageModel(11, 6, 9, num_layers, recurrence, skip_connections=skip)
    params = models.draw_params(model, 0.5)
    ids = np.random.default_rng(0).integers(0, 11, (3, 20))
    carry = make_random_carry(jax.random.key(2), model, 3)
    logits, last = models.apply(model, params, ids, carry)
    assert_close((logits, list(last)), run_model(params, ids, carry, skip=skip))
    step = jax.jit(functools.partial(model.apply_step, model.prepare_step(params)))
    for t in range(20):
        one, carry = step(ids[:, t], carry)
        np.testing.assert_allclose(one, logits[:, t], atol=1e-5)
    assert_close(carry, last)


# A small vocabulary is folded into the recurrence; a large one is looked up.
@pytest.mark.parametrize(("embedding_size", "recurrence"), [(3, "auto"), (6, "auto"), (6, "scan")])
def test_gradients_agree_with_finite_differences(embedding_size: int, recurrence: str) -> None:
    with jax.enable_x64(True):
        model = LanguageModel(7, embedding_size, 4, 2, recurrence, skip_connections=True)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), models.draw_params(model, 0.5))
        carry = jax.tree.map(
            lambda x: x.astype(jnp.float64), make_random_carry(jax.random.key(1), model, 2)
        )
        ids = jnp.array([[1, 2, 3, 4, 5], [6, 0, 2, 2, 1]])

        @jax.jit
        def loss(params: model_lib.Params, carry: model_lib.Carry) -> jax.Array:
            logits, last = model_lib.apply(model, params, ids, carry)
            weights = jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)
            return (weights * logits).sum() + sum((x**2).sum() for x in jax.tree.leaves(last))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, carry)
        flat, unflatten = ravel_pytree((params, carry))
        rng = np.random.default_rng(0)
        for _ in range(20):
            direction = rng.standard_normal(flat.shape)
            step = 1e-5 * direction
            numeric = (loss(*unflatten(flat + step)) - loss(*unflatten(flat - step))) / 2e-5
            exact = ravel_pytree(gradients)[0] @ direction
            np.testing.assert_allclose(exact, numeric, rtol=1e-6)


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
