"""Compare the LSTM of `ops` with the reference, `LSTMCell` under a scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax import matmul, ops
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.ops import LSTMCarry, LSTMParams, processor, xla


def run_layer(
    params: LSTMParams,
    inputs: jax.Array,
    carry: LSTMCarry,
    dtype: str = "float32",
    starts: jax.Array | None = None,
    implementation: Any = "auto",
) -> tuple[jax.Array, LSTMCarry]:
    """Run an LSTM; return its outputs, the first result of which cotangents are given."""
    options: Any = {"dtype": dtype, "implementation": implementation}
    carry, outputs = ops.lstm(params, inputs, carry, reset=starts, **options)
    return outputs, carry


def reference(
    kernels: LSTMParams, rows: jax.Array, carry: LSTMCarry
) -> tuple[jax.Array, LSTMCarry]:
    """Run `LSTMCell` under `lax.scan`; JAX differentiates it."""
    cell = LSTMCell(rows.shape[-1], carry.hidden.shape[-1])
    params = kernels._asdict()

    def step(carry: LSTMCarry, x: jax.Array) -> tuple[LSTMCarry, jax.Array]:
        outputs: Any = cell.apply({"params": params}, carry, x)
        return outputs

    carry, outputs = jax.lax.scan(step, carry, rows.swapaxes(0, 1))
    return outputs.swapaxes(0, 1), carry


def make_problem(
    batch: int, time: int, features: int, hidden: int, seed: int = 0
) -> tuple[LSTMParams, jax.Array, LSTMCarry, Any]:
    """Return random kernels, inputs, a carry, and cotangents of both outputs."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(np.float32(scale * rng.normal(size=shape)))

    kernels = LSTMParams(
        normal(features, 4 * hidden, scale=features**-0.5),
        normal(hidden, 4 * hidden, scale=hidden**-0.5),
        normal(4 * hidden, scale=0.5),
    )
    carry = LSTMCarry(normal(batch, hidden), normal(batch, hidden))
    last = LSTMCarry(normal(batch, hidden), normal(batch, hidden))
    return kernels, normal(batch, time, features), carry, (normal(batch, time, hidden), last)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Assert that differences are within `tolerance` of the largest value, array by array."""

    def check(a: np.ndarray, e: np.ndarray) -> None:
        assert a.shape == e.shape and a.dtype == e.dtype
        assert np.abs(a - e).max() <= tolerance * max(float(np.abs(e).max()), 1e-6)

    # In NumPy, whose operations need no compilation.
    jax.tree.map(check, *jax.device_get((actual, expected)))


def value_and_gradients(function: Any, cotangents: Any, *arguments: Any) -> tuple[Any, Any]:
    @jax.jit
    def run(cotangents: Any, *arguments: Any) -> tuple[Any, Any]:
        outputs, pull_back = jax.vjp(function, *arguments)
        return outputs, pull_back(cotangents)

    result: tuple[Any, Any] = run(cotangents, *arguments)
    return result


# (batch, time, features, hidden), with windows of 1, batches of 1, and sizes that are not multiples
# of the width of a register.
SIZES = [(3, 5, 4, 6), (1, 1, 3, 5), (1, 17, 8, 130), (2, 33, 129, 67), (64, 6, 16, 128)]


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated_layers_agree_with_the_reference(sizes: tuple[int, ...], implementation: str) -> None:
    *arguments, cotangents = make_problem(*sizes)
    run = functools.partial(run_layer, implementation=implementation)
    expected, expected_gradients = value_and_gradients(reference, cotangents, *arguments)
    outputs, gradients = value_and_gradients(run, cotangents, *arguments)
    assert_close(outputs, expected, 1e-5)
    assert_close(gradients, expected_gradients, 1e-4)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("sizes", [*SIZES[1:4:2], SIZES[4], (4, 20, 16, 32)], ids=str)
def test_bfloat16_rounds_matmuls_and_keeps_float32_state(
    sizes: tuple[int, ...], implementation: str
) -> None:
    *arguments, cotangents = make_problem(*sizes)

    low = functools.partial(run_layer, dtype="bfloat16", implementation=implementation)
    outputs, gradients = value_and_gradients(low, cotangents, *arguments)
    expected, expected_gradients = value_and_gradients(reference, cotangents, *arguments)
    assert_close(outputs, expected, 3e-2)
    assert_close(gradients, expected_gradients, 5e-2)
    assert not np.allclose(outputs[0], expected[0], atol=1e-6)


@pytest.mark.skipif(
    "avx512_bf16" not in processor.read_cpu_features(), reason="this CPU has no AVX-512 BF16"
)
def test_bfloat16_matmuls_agree_with_rounded_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare this CPU's instructions with float32 matmuls of rounded factors."""
    *arguments, cotangents = make_problem(16, 20, 48, 60)
    low = functools.partial(run_layer, dtype="bfloat16", implementation="xla")
    results = []
    for in_bfloat16 in (True, False):
        monkeypatch.setattr(xla, "is_faster_in_bfloat16", lambda is_faster=in_bfloat16: is_faster)
        jax.clear_caches()
        assert ("bf16" in jax.jit(low).lower(*arguments).as_text()) == in_bfloat16
        results.append(value_and_gradients(low, cotangents, *arguments))
    jax.clear_caches()
    assert_close(results[0], results[1], 1e-2)


def test_one_column_is_multiplied_like_several_with_any_version_of_jax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    kernel, columns = rng.normal(size=(8, 5)), rng.normal(size=(5, 3))
    for version in ((0, 10, 2), (0, 12, 0)):
        monkeypatch.setattr(jax, "__version_info__", version)
        for number in (1, 3):
            arrays = (jnp.asarray(x, jnp.float32) for x in (kernel, columns[:, :number]))
            product = matmul.multiply_columns(*arrays)
            np.testing.assert_allclose(product, kernel @ columns[:, :number], atol=1e-5)
