"""Test one training step: its gradient, masks and carry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import models
from lstm_jax import batches, train_step
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.devices.mesh import make_mesh
from references import assert_close, run_model


@pytest.fixture(autouse=True)
def draw_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model_lib, "init_params", lambda model, key, counts: models.draw_params(model)
    )


def make_config(batch_size: int = 2) -> ConfigDict:
    """Return the config of a tiny model, with Adam at 0.1."""
    config = config_lib.default()
    config.batches.batch_size, config.optimizer.learning_rate = batch_size, 0.1
    config.model.update(embedding_size=6, hidden_size=9)
    return config


def set_up(
    model: model_lib.LanguageModel, config: ConfigDict
) -> tuple[train_step.TrainState, train_step.TrainStep]:
    """Return the initial state and the step."""
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    mesh = make_mesh(config)
    state = train_step.init_state(model, optimizer, config)
    return state.place(mesh), train_step.make_train_step(model, optimizer, config, mesh)


def make_batch(batch_size: int, time: int, seed: int = 0, reset: bool = True) -> batches.Batch:
    """Return a batch of random ids below 11."""
    ids = np.random.default_rng(seed).integers(0, 11, (batch_size, time + 1)).astype(np.int32)
    return batches.Batch(ids[:, :-1], ids[:, 1:], np.full(batch_size, reset))


@pytest.mark.parametrize("max_gradient_norm", [0.0, 0.01])
def test_one_step_is_adam_on_the_mean_loss(max_gradient_norm: float) -> None:
    model = model_lib.LanguageModel(11, 6, 9)
    config = make_config()
    config.optimizer.max_gradient_norm = max_gradient_norm
    state, train_step = set_up(model, config)
    before = jax.tree.map(jnp.copy, state.params)
    batch = make_batch(2, 7)

    @jax.jit
    @jax.value_and_grad
    def differentiate(params: model_lib.Params) -> jax.Array:
        logits, _ = model_lib.apply(model, params, batch.inputs, model.initial_carry(2))
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, batch.targets[..., None], axis=-1).mean()

    loss, gradients = differentiate(before)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    scale = min(1, max_gradient_norm / norm) if max_gradient_norm else 1
    # Adam's first step, with its moments corrected for their bias, is g / (|g| + 1e-8).
    expected = jax.tree.map(
        lambda p, g: np.asarray(p - 0.1 * scale * g / (np.abs(scale * g) + 1e-8)), before, gradients
    )
    after = train_step(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), after.params, expected)
    assert float(after.loss_sum) == pytest.approx(float(loss), rel=1e-5)
    assert float(after.norm_sum) == pytest.approx(norm, rel=1e-4)  # Before clipping.


def test_microbatches_match_the_step_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare several steps, with masks and the carry."""
    results: list[train_step.TrainState] = []
    apply_mask, sizes = model_lib.apply_mask, set[int]()

    def record(x: jax.Array, mask: Any) -> jax.Array:
        sizes.add(len(x))
        return apply_mask(x, mask)

    monkeypatch.setattr(model_lib, "apply_mask", record)
    for number in (1, 3):
        config = make_config(6)
        config.optimizer.learning_rate = 0.01
        config.optimizer.name = "sgd"
        config.optimizer.microbatches = number
        for name in config.regularization:
            config.regularization[name] = 0.3
        model = model_lib.make_model(config.model, 11)
        state, step = set_up(model, config)
        for seed in range(4):
            state = step(state, make_batch(6, 8, seed, reset=seed == 2))
        results.append(state)
        assert sizes == {6 // number}
        sizes.clear()
    for a, b in zip(
        *map(jax.tree.leaves, ((r.params, r.rest | {"key": 0}) for r in results)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_masks_differ_from_step_to_step_and_follow_the_seed() -> None:
    config = make_config()
    config.regularization.output_dropout = 0.5
    config.optimizer.learning_rate = 1e-30  # So that only the masks differ.
    model = model_lib.make_model(config.model, 11)
    runs: list[list[float]] = []
    for _ in range(2):
        state, step = set_up(model, config)
        runs.append([])
        for _ in range(3):
            state = step(state, make_batch(2, 7))
            runs[-1].append(float(state.loss_sum))
    assert runs[0] == runs[1]
    first, second, third = np.diff([0.0, *runs[0]])
    assert first != second != third


def test_a_tied_embedding_is_dropped_only_where_it_is_read() -> None:
    rates = config_lib.RegularizationConfig(embedding_dropout=0.5)
    model = model_lib.LanguageModel(11, 6, 9, tie_embeddings=True)
    params, key, batch = models.draw_params(model), jax.random.key(0), make_batch(2, 7)
    compute = train_step._make_compute_grads(model, config_lib.Config(regularization=rates))
    read = jnp.asarray(batch.inputs), jnp.asarray(batch.targets), None
    (_, loss), _ = compute(params, key, read, model.initial_carry(2), [None, None])
    dropped = train_step.drop_parameters(rates, params, key)
    bound, inputs = model.bind({"params": dropped}), jnp.asarray(batch.inputs)
    outputs, _ = bound.run(inputs, model.initial_carry(2), None)
    table, bias = map(np.asarray, (params["embedding"]["embedding"], params["dense"]["bias"]))
    logits = np.asarray(outputs) @ table.T + bias
    losses = -np.asarray(jax.nn.log_softmax(logits))
    expected = np.take_along_axis(losses, batch.targets[..., None], axis=2).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_activation_regularization_adds_the_gradients_of_its_definition() -> None:
    """With an identity as dense kernel, the logits are the outputs."""
    model = model_lib.LanguageModel(11, 6, 11)
    params, batch = models.draw_params(model), make_batch(2, 7)
    params = {**params, "dense": {"kernel": jnp.eye(11), "bias": jnp.zeros(11)}}
    carry, mask = model.initial_carry(2), 2.0 * np.random.default_rng(0).integers(0, 2, (2, 11))

    def compute(**weights: float) -> Any:
        rates = config_lib.RegularizationConfig(**weights)
        grads = train_step._make_compute_grads(model, config_lib.Config(regularization=rates))
        read = jnp.asarray(batch.inputs), jnp.asarray(batch.targets), None
        return grads(params, jax.random.key(0), read, carry, [None, jnp.asarray(mask)])[0]

    def penalty(params: Any) -> Any:
        outputs, _ = run_model(params, batch.inputs, carry)
        change = outputs[:, 1:] - outputs[:, :-1]
        dropped = outputs * mask[:, None]
        return 2 * (dropped**2).mean() + 3 * (change**2).sum() / outputs.size

    (grads, loss), (without, same) = compute(activation=2.0, temporal_activation=3.0), compute()
    assert loss == same
    with jax.enable_x64():
        expected = jax.grad(penalty)(jax.tree.map(lambda x: jnp.asarray(x, "float64"), params))
    for name in ("embedding", "lstm_0"):
        difference = jax.tree.map(jnp.subtract, grads[name], without[name])
        assert_close(difference, expected[name], 1e-5)


def test_a_stream_starts_from_the_initial_carry_of_its_cell() -> None:
    """Test one with a stabilizer, which does not start at zero."""
    config = make_config(4)
    config.model.cell, config.model.hidden_size = "slstm", 8
    config.batches.kind, config.batches.reset_probability = "streams", 0.0
    config.optimizer.learning_rate = 1e-30  # So that only the carry differs.
    model = model_lib.make_model(config.model, 11)
    state, step = set_up(model, config)
    carries = []
    for first, reset in ((1, True), (0, True), (0, False)):
        state, _ = set_up(model, config)
        state = step(state, make_batch(4, 8, first))
        carries.append(step(state, make_batch(4, 8, 1, reset)).carry)
    fresh, again, kept = map(jax.tree.leaves, carries)
    jax.tree.map(np.testing.assert_array_equal, fresh, again)
    assert not np.allclose(fresh[0], kept[0], rtol=1e-2, atol=0)
