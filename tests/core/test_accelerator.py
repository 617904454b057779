"""Test what GPUs and TPUs run: its numbers on a CPU, and that every program lowers for both."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accelerators
import commands
from lstm_jax import config, matmul, ops
from lstm_jax.ops import choice, in_c, xla
from lstm_jax.ops.gates import GRU, LSTM, Gating, Layer, Marks, expand
from references import assert_close, draw_layer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose what a GPU runs, and run it on the CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(choice, "choose", lambda name, *_, **__: name.replace("auto", "xla"))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("gating", [LSTM, GRU], ids=lambda gating: gating.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_rounds_what_the_scan_rounds(gating: Gating, batch: int, axis: int) -> None:
    (params, inputs, carry), codes, _ = draw_layer(gating, (12, batch, 5, 6), True)
    marks = Marks(codes == in_c.RESET, codes == in_c.FROZEN)
    # Gates remember, so that a step changes less than bfloat16 can tell apart.
    bias = params.bias.at[6:12].add(5).at[:6].add(-5 if gating is LSTM else 0)
    params = expand(params._replace(bias=bias))
    layer = Layer(gating, "bfloat16", axis, params, inputs, carry, marks)
    actual = xla.run(layer)
    assert_close(actual, jax.tree.map(jnp.asarray, xla.scan(layer)), 1e-4)


def test_a_gradient_in_two_parts_keeps_its_precision() -> None:
    x = np.random.default_rng(0).normal(size=1000).astype("float32")
    high, low = jax.jit(functools.partial(xla.split_number, dtype=jnp.bfloat16))(x)
    assert high.dtype == low.dtype == "bfloat16"
    parts: Any = high.astype("float32") + low.astype("float32")
    np.testing.assert_allclose(parts, x, rtol=2.0**-16)


PROGRAMS = list(accelerators.list_programs(config.Config(), 9, jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_lowers_for_gpus_and_tpus(name: str) -> None:
    settings = config.default()
    settings.model.update({"hidden_size": 48, "embedding_size": 24, "dtype": "bfloat16"})
    settings.batches.update({"kind": "streams", "batch_size": 8, "window_length": 8})
    complete = config.complete_config(settings)
    programs = accelerators.list_programs(complete, 23, jax.devices()[:1])
    lowered = programs[name]().lower(lowering_platforms=("cuda", "tpu"))
    assert "bf16" in lowered.as_text() or "float32" in name
    assert "ffi" not in lowered.as_text()


def test_matmuls_in_bfloat16_are_differentiated_in_bfloat16() -> None:
    factors = jnp.ones((4, 5, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16)
    differentiate = jax.jit(jax.grad(lambda a, b: matmul.matmul_rounded(a, b).sum(), (0, 1)))
    text = differentiate.trace(*factors).lower(lowering_platforms=("cuda",)).as_text()
    operands = re.findall(r"dot_general .*: \((.*?)\)", text)
    assert len(operands) == 2 and "f32" not in "".join(re.findall(r"x(\w+)>", str(operands)))
    for gradient, expected in zip(differentiate(*factors), (2, 20), strict=True):
        np.testing.assert_array_equal(gradient, np.full(gradient.shape, expected))
    one, other = factors[0], factors[1].astype(jnp.float32)
    gradient = jax.grad(lambda a: matmul.matmul(a, other, "float32").sum())(one)
    np.testing.assert_array_equal(gradient, np.full(one.shape, 2))


@pytest.mark.usefixtures("gpu")
def test_matmuls_of_a_layer_are_counted() -> None:
    place: Any = functools.partial(accelerators.place_all, lambda _: None)
    batch, time, hidden = 8, 16, 64
    for kind, gates in (ops.LSTMParams, 4), (ops.GRUParams, 3):
        traced = accelerators.trace_layer(kind, "float32", place, batch, time, hidden)
        flops = accelerators.count_flops(traced.jaxpr.jaxpr)
        needed = 3 * 2 * 2 * batch * time * hidden * gates * hidden
        assert needed <= flops <= 1.5 * needed  # A step back reads zeros, too.


LAYERS = "layer peephole_lstm,layer gru,layer rnn"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("experiment", "programs"),
    [("quick", f"step,{LAYERS}"), ("shakespeare", "step"), ("shakespeare_gpu", "step")],
)
def test_a_step_of_the_loop_starts_at_most_five_kernels(
    experiment: str, programs: str, dtype: str
) -> None:
    pytest.importorskip("jax_cuda12_plugin", reason="the CUDA plugin isn't installed")
    flags = [f"--config=experiments/{experiment}.py", f"--dtype={dtype}", "--programs", programs]
    result = commands.run_python(
        *("benchmarks/accelerators.py", "--target=h100:1", *flags),
        env={"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )
    rows = [line.split("|") for line in result.stdout.splitlines()]
    loops = {row[1].strip(): row[-2] for row in rows if len(row) > 2}
    for program in programs.split(","):
        kernels = [int(loop.split(" x ")[0]) for loop in loops[program].split(",")]
        assert len(kernels) >= 2 and max(kernels) <= 5, result.stdout
