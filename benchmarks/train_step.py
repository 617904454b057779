"""Time a training step in this package and in other libraries.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --hidden_size 512 --num_layers 2 --batch_size 32
    python benchmarks/train_step.py --vocabulary_size 10000 --tie_embeddings 1 --only auto,torch

A step consists of embedding, LSTM layers, dense layer, mean cross-entropy, gradients and Adam. Only
this package and PyTorch tie embeddings.
`pip install -e '.[bench]'` installs the other libraries; a line is printed for each that is
missing.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peers
import side_by_side
from lstm_jax import batches, config, model, optimizer
from lstm_jax.devices import setup
from lstm_jax.devices.mesh import make_mesh
from lstm_jax.train_step import init_state, make_train_step
from side_by_side import Make, Work

LEARNING_RATE = 1e-4


def main() -> None:
    """Measure and print the table."""
    sizes = {"batch_size": 64, "window_length": 100, "tie_embeddings": 0}
    options = side_by_side.parse_options(__doc__, **sizes)
    auto = functools.partial(make_lstm_jax, recurrence="auto")
    contestants: dict[str, Make] = {
        "matmul": _matmul,
        "lstm-jax auto": auto,
        "lstm-jax auto, all regularizers": functools.partial(auto, rate=0.1),
        "lstm-jax auto, all but input_dropout": functools.partial(
            auto, rate=0.1, skipped="input_dropout"
        ),
        "lstm-jax scan": functools.partial(make_lstm_jax, recurrence="scan"),
        **{name: functools.partial(make_peer, peers.MODELS[name]) for name in peers.MODELS},
        "PyTorch": make_torch,
        "PyTorch compiled": functools.partial(make_torch, compiled=True),
    }
    measurements = side_by_side.measure(contestants, options)
    peak = 1 / min(run.seconds for run in measurements.pop("matmul"))
    print(f"peak, the fastest square {options.dtype} matmul: {peak / 1e9:,.0f} GFLOP/s")
    shortest = necessary_flops(options) / peak
    side_by_side.print_table(measurements, "share of peak", lambda x: f"{shortest / x:.2f}")


def necessary_flops(options: argparse.Namespace) -> int:
    """Return the operations of the matmuls that every implementation of the step needs.

    For each token: the recurrent matmul of each layer, the input matmul of each layer but the
    first, and the dense layer's. The first layer's input is a lookup, so it needs only the matmul
    of the rows of the embedding table that are looked up, at most all of them, and the input
    kernel. Each of these matmuls has two more of its size for the gradients, with respect to its
    input and to its kernel.
    """
    first, *others = layer_sizes(options)
    per_token = 4 * first[1] ** 2 + sum(4 * hidden * (n + hidden) for n, hidden in others)
    per_token += layer_sizes(options)[-1][1] * options.vocabulary_size
    lookup = 4 * first[0] * first[1]
    tokens = options.batch_size * options.window_length
    return 3 * 2 * (tokens * per_token + min(options.vocabulary_size, tokens) * lookup)


def layer_sizes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the inputs and hidden units of each layer."""
    last = options.embedding_size if options.tie_embeddings else options.hidden_size
    hidden = [options.hidden_size] * (options.num_layers - 1)
    return list(itertools.pairwise([options.embedding_size, *hidden, last]))


def _batch(options: argparse.Namespace) -> np.ndarray:
    """Return inputs and targets, int32 [2, batch, time]."""
    shape = (2, options.batch_size, options.window_length)
    return np.random.default_rng(0).integers(options.vocabulary_size, size=shape, dtype=np.int32)


def _matmul(options: argparse.Namespace) -> Work:
    """Return the work of a large matmul; its time is that of one operation."""
    device = jax.devices()[0].device_kind
    size = 2048 if device == "cpu" else 8192  # 2048 is too short on a GPU.
    square = jax.random.normal(jax.random.key(0), (size, size)).astype(options.dtype)
    matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))

    def run() -> None:
        matmul(square, square).block_until_ready()

    return Work(run, device, runs_per_turn=3, units=2 * size**3)


def _jax_work(step: Any, state: Any, batch: Any) -> Work:
    """Return the work of a jitted step that donates its state."""
    batch = jax.device_put(batch)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, batch))

    return Work(run, jax.devices()[0].device_kind)


def make_lstm_jax(
    options: argparse.Namespace, recurrence: str, rate: float = 0.0, skipped: str = ""
) -> Work:
    """Return the step of this package, with this rate of every regularizer but one."""
    settings = config.default()
    settings.batches.batch_size = options.batch_size
    for name in ("embedding_size", "hidden_size", "num_layers", "dtype"):
        settings.model[name] = getattr(options, name)
    settings.model.tie_embeddings = bool(options.tie_embeddings)
    settings.model.recurrence = recurrence
    for name in settings.regularization:
        settings.regularization[name] = 0.0 if name == skipped else rate
    complete = config.complete_config(settings)
    setup.use_cores(complete)
    mesh = make_mesh(complete)
    lstm = model.make_model(complete.model, options.vocabulary_size)
    updates = optimizer.make_optimizer(complete.optimizer, 1)
    state = init_state(lstm, updates, complete).place(mesh)
    step = make_train_step(lstm, updates, complete, mesh)
    inputs, targets = _batch(options)
    return _jax_work(step, state, batches.Batch(inputs, targets, np.ones(len(inputs), np.bool_)))


def make_peer(make_model: peers.MakeModel, options: argparse.Namespace) -> Work:
    """Return the step of a model of another JAX library."""
    _refuse_tied(options)
    is_small = options.hidden_size <= setup.LARGEST_HIDDEN_IN_C  # As `use_cores` does.
    jax.config.update("jax_cpu_enable_async_dispatch", is_small)
    optimizer = optax.adam(LEARNING_RATE)
    init, apply, carry = make_model(options, options.batch_size)

    def loss_fn(params: Any, batch: Any) -> Any:
        inputs, targets = batch
        logits = apply(params, inputs, carry)[0].astype("float32")
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, _ = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    batch = _batch(options)
    params = init(jax.random.key(0), batch[0], carry)
    state = params, optimizer.init(params), np.float32(0)
    return _jax_work(jax.jit(step, donate_argnums=0), state, tuple(batch))


def _refuse_tied(options: argparse.Namespace) -> None:
    if options.tie_embeddings:
        raise NotImplementedError("its model here has no tied embeddings")


def make_torch(options: argparse.Namespace, compiled: bool = False) -> Work:
    """Return the step in PyTorch, optionally with `torch.compile`."""
    import torch

    device = side_by_side.torch_device()
    embedding = torch.nn.Embedding(options.vocabulary_size, options.embedding_size)
    make_lstm = functools.partial(torch.nn.LSTM, batch_first=True)
    sizes = layer_sizes(options)
    if options.tie_embeddings:
        lstms = [make_lstm(*size) for size in sizes]
    else:
        lstms = [make_lstm(*sizes[0], options.num_layers)]
    dense = torch.nn.Linear(sizes[-1][1], options.vocabulary_size)
    if options.tie_embeddings:
        dense.weight = embedding.weight
    layers = torch.nn.ModuleList([embedding, *lstms, dense]).to(device)
    optimizer = torch.optim.Adam(layers.parameters(), LEARNING_RATE, fused=True)
    inputs, targets = torch.tensor(_batch(options), dtype=torch.long, device=device)
    bfloat16 = options.dtype == "bfloat16"

    def compute_loss() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            x = embedding(inputs)
            for lstm in lstms:
                x = lstm(x)[0]
            logits = dense(x)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    forward: Callable[[], Any] = torch.compile(compute_loss) if compiled else compute_loss

    def run() -> float:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return Work(run, device.type)


if __name__ == "__main__":
    main()
