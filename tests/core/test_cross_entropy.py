"""Test the loss of large vocabularies, with its custom VJP: in XLA and in C, against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import softmax_cross_entropy_with_integer_labels

import models
from lstm_jax.cross_entropy import compute_cross_entropy
from lstm_jax.model import LanguageModel
from lstm_jax.ops import choice, native
from references import assert_close, compute_exactly, measure_errors, value_and_gradients

# (rows, features, vocabulary): one row; odd numbers; parts of tiles; more and fewer rows than
# tokens; and a depth that is divided into blocks.
SIZES = [(1, 16, 130), (35, 33, 1001), (200, 600, 77), (7, 1030, 64)]


@pytest.fixture(params=[False, True], ids=["XLA", "C"])
def uses_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the test without the library in C, and with it if it can run here."""
    dtypes = native.list_dtypes() if request.param else []
    if request.param and not dtypes:
        pytest.skip("no library in C here")
    monkeypatch.setattr(choice, "runs_in_c", lambda work, dtype, *_: dtype in dtypes)
    return bool(request.param)


def draw_problem(sizes: tuple[int, int, int], is_transposed: bool) -> Any:
    """Return inputs, kernel and bias; targets; and cotangents of the losses."""
    rows, features, vocabulary = sizes
    rng = np.random.default_rng(0)
    shape = (vocabulary, features) if is_transposed else (features, vocabulary)
    arrays = rng.normal(size=(rows, features)), rng.normal(size=shape), rng.normal(size=vocabulary)
    arrays = arrays[0] / features**0.5, *arrays[1:]
    return arrays, rng.integers(vocabulary, size=rows, dtype=np.int32), rng.normal(size=rows)


def compute_losses(arrays: Any, targets: Any, tied: bool, dtype: str) -> jax.Array:
    inputs, kernel, bias = arrays
    return compute_cross_entropy(inputs, kernel, bias, jnp.asarray(targets), tied, dtype)


def to_float32(arrays: Any) -> Any:
    return [jnp.asarray(array, "float32") for array in arrays]


def differentiate(arrays: Any, targets: Any, weights: Any, tied: bool, dtype: str) -> Any:
    def run(*arrays: Any) -> jax.Array:
        return compute_losses(arrays, targets, tied, dtype)

    losses, grads = value_and_gradients(run, *to_float32((weights, *arrays)))
    return jax.device_get((losses, *grads))


@pytest.mark.usefixtures("uses_c")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_and_gradients_agree_with_autodiff(
    sizes: tuple[int, int, int], tied: bool, dtype: str, bound: float
) -> None:
    check_losses(sizes, tied, dtype, bound)


def check_losses(sizes: tuple[int, int, int], tied: bool, dtype: str, bound: float) -> None:
    arrays, targets, weights = draw_problem(sizes, tied)

    def run(inputs: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        logits = inputs @ (kernel.T if tied else kernel) + bias[None]
        return softmax_cross_entropy_with_integer_labels(logits, targets)

    losses, grads = compute_exactly(run, weights, *arrays)
    actual = differentiate(arrays, targets, weights, tied, dtype)
    assert measure_errors(actual, (losses, *grads)) < bound
    alone = compute_losses(to_float32(arrays), targets, tied, dtype)  # Without derivatives.
    np.testing.assert_allclose(alone, actual[0], rtol=1e-6)


@pytest.mark.usefixtures("uses_c")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@jax.debug_nans(False)
def test_a_number_that_is_not_finite_reaches_the_loss(bad: float) -> None:
    arrays, targets, weights = draw_problem((3, 16, 100), False)
    arrays[0][1, 2] = bad
    losses, *grads = differentiate(arrays, targets, weights, False, "bfloat16")
    assert np.isfinite(losses).tolist() == [True, False, True]
    assert not np.isfinite(grads[1]).all()


@pytest.mark.usefixtures("uses_c")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@jax.debug_nans(False)
def test_the_loss_of_a_target_outside_of_the_vocabulary_is_nan(dtype: str) -> None:
    arrays, targets, _ = draw_problem((4, 16, 100), False)
    targets[1:3] = -1, 100
    losses = compute_losses(to_float32(arrays), targets, False, dtype)
    assert np.isnan(losses).tolist() == [False, True, True, False]


@pytest.mark.usefixtures("uses_c")
def test_gradients_without_a_row_are_zero() -> None:
    arrays, targets, _ = draw_problem((0, 16, 100), False)

    def loss_fn(*arrays: jax.Array) -> jax.Array:
        return compute_losses(arrays, targets, False, "bfloat16").sum()

    # Without `jit`: XLA removes calls whose results are empty.
    grads = jax.grad(loss_fn, (0, 1, 2))(*to_float32(arrays))
    assert [x.shape for x in grads] == [x.shape for x in arrays]
    assert not any(x.any() for x in grads)


def test_losses_in_c_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not choice.runs_in_c("losses", "bfloat16"):
        pytest.skip("no library in C here")
    results = []
    for threads in (1, 2, 100):
        monkeypatch.setattr(native, "count_threads", lambda threads=threads: threads)
        arrays, targets, weights = draw_problem((210, 32, 300), True)
        results += [differentiate(arrays, targets, weights, True, "bfloat16") for _ in range(3)]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


@pytest.mark.usefixtures("uses_c")
def test_gradients_in_a_shard_map_that_checks_its_axes() -> None:
    arrays, targets, weights = draw_problem(SIZES[1], False)
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))

    def loss_fn(inputs: Any, kernel: Any, bias: Any) -> Any:
        losses = compute_losses((inputs, kernel, bias), targets, False, "bfloat16")
        return jax.lax.psum((losses * weights.astype("float32")).sum(), "data")

    divided = jax.shard_map(loss_fn, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P())
    grads = jax.jit(jax.grad(divided, (0, 1, 2)))(*to_float32(arrays))
    assert_close(grads, differentiate(arrays, targets, weights, False, "bfloat16")[1:], 1e-6)


@pytest.mark.usefixtures("uses_c")
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_the_losses_of_its_logits(tied: bool) -> None:
    lstm = LanguageModel(1001, 24, 16, tie_embeddings=tied, dtype="bfloat16")
    params = models.draw_params(lstm)
    ids = jnp.asarray(np.random.default_rng(0).integers(1001, size=(3, 6)), "int32")
    inputs, targets, carry = ids[:, :-1], ids[:, 1:], lstm.initial_carry(3)

    def from_logits(params: Any) -> jax.Array:
        logits, _ = models.apply(lstm, params, inputs, carry)
        return softmax_cross_entropy_with_integer_labels(logits, targets)

    def measured(params: Any) -> jax.Array:
        return lstm.measure(params, inputs, targets, carry)[0]

    def run(losses: Any) -> Any:
        grad = jax.grad(lambda params: (losses(params) * jnp.arange(5)[None]).mean())
        return losses(params), grad(params)

    assert_close(jax.jit(lambda: run(measured))(), jax.jit(lambda: run(from_logits))(), 1e-2)
