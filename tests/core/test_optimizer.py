"""Compare each optimizer and schedule with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import optimizer as optimizer_lib


def make_fields(**fields: object) -> ConfigDict:
    """Return the `optimizer` fields with some values changed."""
    optimizer = config_lib.default().optimizer
    optimizer.update(fields)
    return optimizer


_PROGRESS = np.arange(100) / 100  # The fraction of the steps after warm-up.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", np.ones(100)),
        ("cosine", 0.5 * (1 + np.cos(np.pi * _PROGRESS))),
        ("linear", 1 - _PROGRESS),
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule: str, expected: np.ndarray) -> None:
    fields = make_fields(learning_rate=1.0, warmup_steps=10, schedule=schedule)
    optimizer = optimizer_lib.make_optimizer(fields, 110)
    params, update_once = np.zeros(1, np.float32), jax.jit(optimizer.update)
    state = optimizer.init(params)
    sizes = []
    for _ in range(110):
        # With a constant gradient, the size of Adam's step is the learning rate.
        update, state = update_once(np.ones(1, np.float32), state, params)
        sizes.append(-float(np.asarray(update)[0]))
    np.testing.assert_allclose(sizes[:11], np.arange(11) / 10, atol=1e-4)
    np.testing.assert_allclose(sizes[10:], expected, atol=1e-4)


def run(fields: ConfigDict, grads: list[np.ndarray], start: np.ndarray) -> np.ndarray:
    """Return the parameters after one step with each gradient."""
    optimizer = optimizer_lib.make_optimizer(fields, 10)
    params = jnp.asarray(start, jnp.float32)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(jnp.asarray(grad, jnp.float32), state, params)
        params = params + jnp.asarray(updates)
    return np.asarray(params)


def test_sgd_with_momentum_and_weight_decay() -> None:
    rng = np.random.default_rng(0)
    start, *gradients = rng.normal(size=(4, 3, 2))
    fields = make_fields(name="sgd", learning_rate=0.1, momentum=0.8, weight_decay=0.5)
    params, velocity = start, np.zeros((3, 2))
    for gradient in gradients:
        velocity = 0.8 * velocity + gradient + 0.5 * params
        params = params - 0.1 * velocity
    np.testing.assert_allclose(run(fields, gradients, start), params, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adamw(decay: float) -> None:
    rng = np.random.default_rng(0)
    start, *gradients = rng.normal(size=(4, 3, 2))
    params, mean, square = start, np.zeros((3, 2)), np.zeros((3, 2))
    for t, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        scaled = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        params = params - 0.1 * (scaled + decay * params)
    fields = make_fields(learning_rate=0.1, weight_decay=decay)
    np.testing.assert_allclose(run(fields, gradients, start), params, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "muon", "sgd"])
def test_kernels_decay_and_vectors_do_not(name: str) -> None:
    fields = make_fields(name=name, learning_rate=0.1, weight_decay=0.5)
    names = "peepholes", "convolution"
    vectors = {"bias": jnp.ones(2)} | {name: jnp.ones((3, 2)) for name in names}
    params = {"lstm_0": {"kernel": jnp.ones((2, 2)), **vectors}}
    optimizer = optimizer_lib.make_optimizer(fields, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    of_layer = updates["lstm_0"]
    np.testing.assert_allclose(of_layer.pop("kernel"), -0.05, atol=1e-6)
    jax.tree.map(lambda update: np.testing.assert_array_equal(update, 0), of_layer)


def orthogonalize(matrix: np.ndarray) -> np.ndarray:
    """Apply Muon's polynomial to the singular values of a matrix, five times."""
    u, s, v = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


def test_muon_updates_recurrent_layers_and_adam_the_rest() -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "lstm_0": {"input_kernel": (5, 8), "recurrent_kernel": (2, 8), "bias": (8,)},
        "block_0": {"peepholes": (3, 4), "convolution": (4, 4)},
        "dense": {"kernel": (2, 3), "bias": (3,)},
        "embedding": {"embedding": (3, 5)},
    }
    params, *gradients = (
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape)),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(3)
    )
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "b2": 0.9}
    muon = optimizer_lib.make_optimizer(make_fields(name="muon", momentum=0.8, **settings), 10)
    adam = optimizer_lib.make_optimizer(make_fields(**settings), 10)
    state, adam_state = muon.init(params), adam.init(params)
    update_muon, update_adam = jax.jit(muon.update), jax.jit(adam.update)
    mean = jax.tree.map(jnp.zeros_like, params)
    for t, gradient in enumerate(gradients, start=1):
        updates, state = update_muon(gradient, state, params)
        expected, adam_state = update_adam(gradient, adam_state, params)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, gradient)
        for name in ("input_kernel", "recurrent_kernel"):
            # Nesterov's momentum, with the bias of its two terms corrected.
            ahead = 0.8 * mean["lstm_0"][name] / (1 - 0.8 ** (t + 1))
            ahead += 0.2 * gradient["lstm_0"][name] / (1 - 0.8**t)
            scaled = 0.2 * np.sqrt(8) * orthogonalize(np.asarray(ahead))
            expected["lstm_0"][name] = -0.1 * (scaled + 0.5 * params["lstm_0"][name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), updates, expected)
