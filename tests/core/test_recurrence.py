"""Compare the implementations of gated layers in JAX with their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax import matmul
from lstm_jax.ops import processor, xla
from lstm_jax.ops.gates import LSTM, Gating
from references import (
    KINDS,
    SIZES,
    assert_close,
    check_layer,
    draw_layer,
    run_layer,
    value_and_gradients,
)

CASES = [(LSTM, sizes) for sizes in SIZES] + [(gating, SIZES[3]) for gating in KINDS[1:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("gating", "sizes"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_every_kind_agrees_with_its_equations(
    gating: Gating, sizes: tuple[int, ...], dtype: str
) -> None:
    check_layer(gating, sizes, dtype, ("scan", "cpu"), ("xla", "cpu"), ("xla", "gpu"))


@pytest.mark.skipif(
    "avx512_bf16" not in processor.read_cpu_features(), reason="this CPU has no AVX-512 BF16"
)
def test_bfloat16_matmuls_agree_with_rounded_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare this CPU's instructions with float32 matmuls of rounded factors."""
    arguments, marks, cotangents = draw_layer(LSTM, (20, 16, 48, 60))
    low = functools.partial(run_layer, "xla", "cpu", LSTM, marks, "bfloat16")
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
