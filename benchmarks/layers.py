"""Time a recurrent layer, forward and backward, in this package and in other libraries.

    python benchmarks/layers.py --only gru
    python benchmarks/layers.py --only peephole,rnn --hidden_size 512 --dtype bfloat16

Each computes the gradients of its parameters and inputs, given those of all outputs, or its outputs
only (--work outputs). The rounds alternate between the libraries, all in one process. The rows
whose names have a word of --only run, and an LSTM in XLA; ratios are to the first row. Nothing is
set that a program would have to set: docs/layers.md has the variables with which glibc keeps freed
memory. `pip install -e '.[bench]'` installs the other libraries; a line is printed for each that is
missing.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import side_by_side
from frame import parse_flags
from lstm_jax import ops
from side_by_side import Make, Times, Work

# The output of a layer: parameters and inputs [batch, time, features] → [batch, time, hidden].
Layer = tuple[Callable[[Any, jax.Array], jax.Array], Any]

BASELINE = "lstm xla"
OURS: dict[str, Any] = {
    "lstm": ops.LSTMParams,
    "peephole": ops.PeepholeLSTMParams,
    "gru": ops.GRUParams,
    "rnn": ops.RNNParams,
}
FLAX = {"lstm": "OptimizedLSTMCell", "gru": "GRUCell", "rnn": "SimpleCell"}
EQUINOX = {"lstm": "LSTMCell", "gru": "GRUCell"}
TORCH = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


def main() -> None:
    """Measure and print the table."""
    sizes: dict[str, Any] = {"batch_size": 32, "window_length": 128, "hidden_size": 256}
    options = parse_flags(__doc__, **sizes, rounds=5, dtype="float32", only="gru", work="gradients")
    side_by_side.print_machine(jax.devices()[0].device_kind, options)
    works: dict[str, Work] = {}
    for name, make in list_contestants().items():
        if name == BASELINE or any(word in name for word in options.only.split(",")):
            try:
                works[name] = make(options)
                for _ in range(2):
                    works[name].run()
            except Exception as error:  # Not installed, or it does not run here.
                works.pop(name, None)
                print(f"{name} is skipped: {str(error).splitlines()[0]}")
    times: dict[str, list[Times]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            times[name].append(side_by_side.time_work(work))
    tokens = options.batch_size * options.window_length
    side_by_side.print_table(times, "tokens/s", lambda x: f"{tokens / x:,.0f}")


def list_contestants() -> dict[str, Make]:
    """Return the function that makes each contestant."""
    contestants: dict[str, Make] = {}
    for cell, kind in OURS.items():
        for name in ("c", "xla", "scan"):
            make: Any = functools.partial(make_ours, kind, name)
            contestants[f"{cell} {name}"] = functools.partial(make_work, make)
        makers = make_flax, make_nnx, make_equinox
        for make_layer, cells in zip(makers, (FLAX, FLAX, EQUINOX), strict=True):
            if cell in cells:
                name = make_layer.__name__.removeprefix("make_")
                make = functools.partial(make_layer, cells[cell])
                contestants[f"{cell} {name}"] = functools.partial(make_work, make)
        if cell in TORCH:
            contestants[f"{cell} pytorch"] = functools.partial(make_torch, TORCH[cell])
    return contestants


def draw_inputs(options: argparse.Namespace) -> np.ndarray:
    """Return inputs and gradients of outputs, float32 [2, batch, time, hidden]."""
    shape = 2, options.batch_size, options.window_length, options.hidden_size
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def make_work(make_layer: Callable[..., Layer], options: argparse.Namespace) -> Work:
    """Return the work of a layer of a JAX library; its result is what it computes."""
    inputs, d_outputs = jnp.asarray(draw_inputs(options))
    apply, params = make_layer(options, inputs)

    @jax.jit
    def compute(params: Any, inputs: jax.Array, d_outputs: jax.Array) -> Any:
        if options.work == "outputs":
            return apply(params, inputs)
        outputs, pull_back = jax.vjp(apply, params, inputs)
        return outputs, pull_back(d_outputs.astype(outputs.dtype))

    def run() -> Any:
        return jax.block_until_ready(compute(params, inputs, d_outputs))

    return Work(run, jax.devices()[0].device_kind)


def make_ours(kind: Any, name: Any, options: argparse.Namespace, inputs: jax.Array) -> Layer:
    """Make a layer of `ops` with one implementation."""

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        return ops.run(params, inputs, dtype=options.dtype, implementation=name)[1]

    return apply, kind.init(jax.random.key(0), options.hidden_size, options.hidden_size)


def make_flax(cell: str, options: argparse.Namespace, inputs: jax.Array) -> Layer:
    """Make a layer of Flax Linen."""
    import flax.linen as nn

    layer = nn.RNN(getattr(nn, cell)(options.hidden_size, dtype=options.dtype))
    carry = make_carry(cell, options)
    apply: Any = functools.partial(layer.apply, initial_carry=carry)
    return apply, layer.init(jax.random.key(0), inputs, initial_carry=carry)


def make_carry(cell: str, options: argparse.Namespace) -> Any:
    """Return a carry of zeros for a cell of Flax, in the dtype of the next one."""
    dtype = options.dtype if cell == "SimpleCell" else "float32"
    zeros = jnp.zeros((options.batch_size, options.hidden_size), dtype)
    return (zeros, zeros) if cell == "OptimizedLSTMCell" else zeros


def make_nnx(cell: str, options: argparse.Namespace, inputs: jax.Array) -> Layer:
    """Make a layer of Flax NNX."""
    from flax import nnx

    size, rngs = options.hidden_size, nnx.Rngs(0)
    layer: Any = nnx.RNN(
        getattr(nnx, cell)(size, size, dtype=jnp.dtype(options.dtype), rngs=rngs), rngs=rngs
    )
    split: Any = nnx.split(layer, nnx.Param, ...)
    graph, params, others = split
    carry = make_carry(cell, options)

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, others)(inputs, initial_carry=carry)

    return apply, params


def make_equinox(cell: str, options: argparse.Namespace, inputs: jax.Array) -> Layer:
    """Make a layer of Equinox, a scan over time, with all arithmetic in `options.dtype`."""
    import equinox as eqx

    size = options.hidden_size
    params, static = eqx.partition(
        getattr(eqx.nn, cell)(size, size, key=jax.random.key(0)), eqx.is_array
    )

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        low, inputs = jax.tree.map(lambda x: x.astype(options.dtype), (params, inputs))
        layer = jax.vmap(eqx.combine(low, static))
        zeros = jnp.zeros((len(inputs), size), options.dtype)

        def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            carry = layer(x, carry)
            return carry, carry[0] if cell == "LSTMCell" else carry

        carry = (zeros, zeros) if cell == "LSTMCell" else zeros
        return jax.lax.scan(step, carry, inputs.swapaxes(0, 1))[1].swapaxes(0, 1)

    return apply, params


def make_torch(cell: str, options: argparse.Namespace) -> Work:
    """Return the work of a layer of PyTorch."""
    import torch

    device = side_by_side.torch_device()
    size = options.hidden_size
    layer = getattr(torch.nn, cell)(size, size, batch_first=True).to(device)
    inputs, d_outputs = torch.tensor(draw_inputs(options), device=device)
    inputs.requires_grad_()
    is_low, differentiates = options.dtype == "bfloat16", options.work == "gradients"

    def run() -> Any:
        layer.zero_grad()
        inputs.grad = None
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=is_low),
            torch.set_grad_enabled(differentiates),
        ):
            outputs = layer(inputs)[0]
        if differentiates:
            outputs.backward(d_outputs.to(outputs.dtype))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return outputs.detach(), ([p.grad for p in layer.parameters()], inputs.grad)

    return Work(run, device.type)


if __name__ == "__main__":
    main()
