"""Test the recurrence in C: against NumPy, in every transformation of JAX, and without it."""

import functools
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import call_handlers
import models
import test_cross_entropy
from lstm_jax import model, ops
from lstm_jax.ops import LSTMCarry, LSTMParams, choice, in_c, native, processor
from lstm_jax.ops.gates import GRU, LSTM, Gating, Layer, Marks, expand
from references import (
    KINDS,
    SIZES,
    assert_close,
    check_layer,
    draw_layer,
    measure_errors,
    run_equations,
    run_layer,
    to_bfloat16,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.skipif(not native.list_dtypes(), reason="no library for this processor"),
    pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler"),
]

every_kind = pytest.mark.parametrize("gating", KINDS, ids=lambda gating: gating.name)
in_both = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> None:
    """Skip tests in bfloat16 where the library can't multiply it."""
    assert native.load_library()
    if "bfloat16" in request.node.name and "bfloat16" not in native.list_dtypes():
        pytest.skip("the library does not multiply bfloat16 here")


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the code for AMX, on any processor with AVX-512 BF16: its instructions are emulated."""
    header = Path(__file__).parents[1] / "emulated_tiles.h"
    features = processor.read_cpu_features() | {"amx_bf16"}
    monkeypatch.setattr(native, "read_cpu_features", lambda: features)
    flags = native.list_flags() or []
    monkeypatch.setattr(native, "list_flags", lambda: [*flags, "-include", str(header)])
    native.load_library.cache_clear()
    jax.clear_caches()
    try:
        loaded = native.load_library()
        assert loaded and loaded.uses_amx
        yield
    finally:
        native.load_library.cache_clear()
        jax.clear_caches()


def without_library(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it is without the library."""

    def call(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "load_library", lambda: None)
            return function(*arguments)

    return call


def uses_library(function: Callable[..., Any], *arguments: Any) -> bool:
    return 'custom_call @"lstm-' in jax.jit(lambda *a: function(*a)).lower(*arguments).as_text()


@in_both
@every_kind
def test_every_kind_agrees_with_its_equations(gating: Gating, dtype: str) -> None:
    for sizes in SIZES if gating is LSTM else SIZES[3:6]:
        check_layer(gating, sizes, dtype, ("c", "cpu"))


@in_both
@every_kind
def test_a_step_of_every_kind_agrees_with_its_equations(gating: Gating, dtype: str) -> None:
    (params, inputs, carry), *_ = draw_layer(gating, (1, 7, 31, 80))
    ids = jnp.arange(7) % 31
    for one_hot, x in (False, inputs), (True, jax.nn.one_hot(ids, 31)[None]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "runs_in_c", lambda *_: True)
            layer = ops.prepare(params, is_one_hot=one_hot, dtype=dtype)
        expected = run_equations(gating, None, "float32" if one_hot else dtype, params, x, carry)[1]
        found, _ = jax.jit(type(layer).step)(layer, ids if one_hot else x[0], carry)
        assert measure_errors(found, expected) < (1e-5 if dtype == "float32" else 3e-3)


@in_both
@every_kind
@jax.debug_nans(False)
def test_an_infinite_input_saturates_as_in_a_scan(gating: Gating, dtype: str) -> None:
    (params, inputs, carry), *_ = draw_layer(gating, (5, 3, 4, 20))
    inputs = inputs.at[2, 1, 3].set(jnp.inf).swapaxes(0, 1)

    def run(implementation: Any) -> Any:
        def loss_fn(bias: jax.Array) -> Any:
            options: Any = {"implementation": implementation, "dtype": dtype}
            _, outputs = ops.run(params._replace(bias=bias), inputs, carry, **options)
            return outputs.sum(), outputs

        return jax.grad(loss_fn, has_aux=True)(params.bias)

    found, expected = run("c"), run("scan")
    assert np.isfinite(expected[0]).all() and np.isfinite(expected[1]).all()
    assert_close(found, expected, 1e-5 if dtype == "float32" else 3e-2)


def test_wrong_arrays_are_errors_of_xla() -> None:
    (params, inputs, carry), *_ = draw_layer(GRU, (3, 2, 5, 16))
    marks = Marks(jnp.zeros((2, 3), bool), None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ARGUMENT: lstm_forward: wrong arrays"):
        in_c.run(Layer(GRU, "float32", 1, expand(params), inputs, carry, marks))


@in_both
@pytest.mark.parametrize("rows, width", [(7, 33), (33, 7)])
def test_matmuls_with_a_depth_of_several_parts_agree_with_numpy(
    rows: int, width: int, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    shapes = (rows, 9000), (9000, width)
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    expected = np.asarray(a, float) @ np.asarray(b, float)
    for transpose_a, transpose_b in itertools.product((False, True), repeat=2):
        factors = a.T if transpose_a else a, b.T if transpose_b else b
        product = in_c.matmul(*factors, transpose_a=transpose_a, transpose_b=transpose_b)
        assert_close(product, expected, 1e-5)


@pytest.mark.process  # Compiles the library.
def test_no_array_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """Call every function with right and wrong arrays, under AddressSanitizer where gcc has it."""
    find = ["cc", "-print-file-name=libasan.so"]
    sanitizer = subprocess.run(find, capture_output=True, text=True).stdout.strip()
    command = ["cc", *(native.list_flags() or ())]
    command += ["-fsanitize=address"] * os.path.isabs(sanitizer)
    call_handlers.check_calls(call_handlers.compile_program(tmp_path / "program", command))


@pytest.mark.process  # Compiles the library.
@pytest.mark.usefixtures("amx")
def test_bfloat16_with_amx_agrees_with_numpy() -> None:
    for gating in KINDS:
        for sizes in (*SIZES, (2, 35, 7, 32)) if gating is LSTM else SIZES[3:4]:
            check_layer(gating, sizes, "bfloat16", ("c", "cpu"))
        test_a_step_of_every_kind_agrees_with_its_equations(gating, "bfloat16")
    for losses in test_cross_entropy.SIZES:
        test_cross_entropy.check_losses(losses, True, "bfloat16", 4e-3)
    test_steps_agree_with_windows(20, 32, 48, False, "bfloat16")


@in_both
@jax.debug_nans(False)
def test_activations_are_accurate_to_the_rounding_of_float32(dtype: str) -> None:
    """Choose the gates by their bias, with kernels of zero: o tanh(i g), saturated or not."""
    g = np.concatenate([np.geomspace(1e-30, 1e3, 500), [0, 1e38, np.inf, np.nan], -np.arange(8.0)])
    g = to_bfloat16(g)
    bias = jnp.asarray([np.full(512, 40.0), g, g, g], jnp.float32).reshape(-1)  # i, f, g, o
    kernels = LSTMParams(jnp.zeros((2, 2048)), jnp.zeros((512, 2048)), bias)
    carry = LSTMCarry(jnp.zeros((1, 512)), jnp.zeros((1, 512)))
    _, last = run_layer("c", "cpu", LSTM, None, dtype, kernels, jnp.zeros((1, 1, 2)), carry)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(last.cell[0], np.tanh(g), rtol=1e-6)
        hidden = np.tanh(np.tanh(g)) / (1 + np.exp(-g))
    np.testing.assert_allclose(last.hidden[0], hidden, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("batch", "hidden"), [(1, 240), (64, 48), (7, 240)])
@in_both
def test_results_do_not_depend_on_the_number_of_threads(
    batch: int, hidden: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use one, as many as there are cores, and more than there are texts, tiles or cores."""
    arguments, _, cotangents = draw_layer(LSTM, (6, batch, 9, hidden))
    run = functools.partial(run_layer, "c", "cpu", LSTM, None, dtype)
    results = []
    for threads in (1, 2, 3, 100):
        monkeypatch.setattr(native, "count_threads", lambda threads=threads: threads)
        jax.clear_caches()
        differentiate = jax.jit(lambda *a: value_and_gradients(run, *a))
        results += [differentiate(cotangents, *arguments) for _ in range(20)]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    if batch > 1:  # A text's results don't depend on the texts beside it.
        params, inputs, carry = arguments
        part, _ = run(params, inputs[:, 4:7], jax.tree.map(lambda x: x[4:7], carry))
        np.testing.assert_array_equal(part, results[0][0][0][:, 4:7])


# With tied embeddings the last layer is of their size.
@pytest.mark.parametrize(
    ("batch", "features", "hidden", "tied", "dtype"),
    [(1, 24, 48, False, "float32"), (7, 24, 48, False, "bfloat16"), (7, 48, 25, True, "float32")],
)
def test_steps_agree_with_windows(
    batch: int, features: int, hidden: int, tied: bool, dtype: str
) -> None:
    """Read a text token by token, as generation does, and at once."""
    sizes = (30, features, hidden)
    lstm = model.LanguageModel(*sizes, num_layers=3, tie_embeddings=tied, dtype=dtype)
    params = models.draw_params(lstm, 0.25)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 30, (batch, 6)))
    expected = models.apply(lstm, params, ids, lstm.initial_carry(batch))
    tolerance = 1e-5 if dtype == "float32" else 1e-2

    def read() -> Any:
        arrays, carry, logits = lstm.prepare_step(params), lstm.initial_carry(batch), []
        for t in range(6):
            found, carry = lstm.apply_step(arrays, ids[:, t], carry)
            logits.append(found)
        return jnp.stack(logits, axis=1), carry

    assert uses_library(read)
    assert not without_library(uses_library)(read)
    assert_close(jax.jit(lambda: read())(), expected, tolerance)


@in_both
def test_layers_use_the_library_where_it_is_faster(dtype: str) -> None:
    arguments, *_ = draw_layer(LSTM, (4, 3, 5, 24))
    run: Any = functools.partial(ops.lstm, dtype=dtype)
    params, inputs, carry = arguments[0], arguments[1].swapaxes(0, 1), arguments[2]
    assert uses_library(run, params, inputs, carry)
    assert not without_library(uses_library)(run, params, inputs, carry)
    texts = params, *jax.tree.map(lambda x: x[:, None], (inputs, carry))
    assert uses_library(jax.vmap(run, (None, 0, 0)), *texts)
    found = jax.vmap(run, (None, 0, 0))(*texts)[1][:, 0]
    assert_close(found, run(params, inputs, carry)[1], 1e-6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty directory for the library, and load it anew before and after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_library.cache_clear()
    yield tmp_path / "lstm-jax" / "library"
    native.load_library.cache_clear()


@pytest.mark.process
def test_the_library_is_compiled_once_for_each_source(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = native.list_flags() or []
    path = native.build_library(flags)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert native.build_library(flags) == path and list(cache.iterdir()) == [path]
    content = path.read_bytes()
    for damaged in (content[:1000], content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
        path.unlink()  # This process has mapped the file that is to be replaced.
        path.write_bytes(damaged)
        assert native.build_library(flags).read_bytes() == content
    shutil.copytree(native._SOURCE.parent, tmp_path / "ops")
    source = tmp_path / "ops" / "lstm.c"
    monkeypatch.setattr(native, "_SOURCE", source)
    with source.with_name("platform.h").open("a") as file:
        file.write("// Changed.\n")
    assert native.build_library(flags) != path
    assert native.build_library([*flags, "-g"]) != path


@pytest.mark.process
def test_without_a_library_a_warning_says_why(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_warning() -> str:
        native.load_library.cache_clear()
        assert not native.load_library()
        return capsys.readouterr().err

    source = tmp_path / "lstm.c"
    source.write_text("int main( {}")
    source.with_name("platform.h").touch()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_SOURCE", source)
        assert re.search(r"the C compiler cc can't compile .*lstm\.c: .*error", read_warning())
        patch.setenv("XDG_CACHE_HOME", str(source))
        assert "can't use lstm-jax/library in XDG_CACHE_HOME" in read_warning()
    assert list(cache.iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = tmp_path / "cc"
    compiler.write_bytes(b"#!/bin/sh\n/bin/echo 'erreur: r\xe9sum\xe9, error' >&2; exit 1\n")
    compiler.chmod(0o700)
    assert "erreur: r\ufffdsum\ufffd" in read_warning()
    compiler.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_TIMEOUT", 0.2)
        assert "the C compiler cc takes more than 0.2 seconds" in read_warning()
    assert list(cache.iterdir()) == []
    compiler.unlink()
    assert read_warning() == (
        "warning: layers run without the library in C, which is faster: "
        "the C compiler cc can't be run (No such file or directory): install gcc or clang\n"
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_steps_are_differentiated(dtype: str, tolerance: float) -> None:
    lstm = model.LanguageModel(9, 16, 32, 2, dtype=dtype)
    params = models.draw_params(lstm)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 5)))

    def sum_logits(params: Any, carry: Any) -> jax.Array:
        arrays, total = lstm.prepare_step(params), jnp.zeros(())
        for t in range(5):
            logits, carry = lstm.apply_step(arrays, ids[:, t], carry)
            total += jnp.sin(logits).sum()
        return total

    def differentiate() -> Any:
        gradients = jax.jit(jax.grad(lambda *a: sum_logits(*a), argnums=(0, 1)))
        return gradients(params, lstm.initial_carry(3))

    assert uses_library(sum_logits, params, lstm.initial_carry(3))
    found, expected = differentiate(), without_library(differentiate)()
    assert_close(found, expected, tolerance)
