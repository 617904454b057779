"""Time a training step in this package and in other libraries.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --hidden_size 512 --num_layers 2 --batch_size 32

A step consists of embedding, LSTM layers, dense layer, mean cross-entropy, gradients and Adam. The
processes of all libraries keep the memory that a step frees (lstm_jax/devices/memory.py).
`pip install -e '.[bench]'` installs the other libraries; a line is printed for each that is
missing.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import side_by_side
from lstm_jax.devices import memory
from side_by_side import Work

LEARNING_RATE = 1e-4


def main() -> None:
    """Measure and print the table."""
    options = side_by_side.parse_options(
        __doc__,
        batch_size=64,
        window_length=100,
        embedding_size=256,
        hidden_size=1024,
        num_layers=1,
        vocabulary_size=67,
    )
    ours = "lstm-jax fused"
    contestants = {
        "matmul": functools.partial(_matmul, options.dtype),
        ours: functools.partial(make_lstm_jax, options, "fused"),
        "lstm-jax fused, all regularizers": functools.partial(
            make_lstm_jax, options, "fused", True
        ),
        "lstm-jax fused, all but input_dropout": functools.partial(
            make_lstm_jax, options, "fused", True, "input_dropout"
        ),
        "lstm-jax scan": functools.partial(make_lstm_jax, options, "scan"),
        "lstm-jax cudnn": functools.partial(make_lstm_jax, options, "cudnn"),
        "Flax LSTMCell": functools.partial(_flax, options, "LSTMCell"),
        "Flax OptimizedLSTMCell": functools.partial(_flax, options, "OptimizedLSTMCell"),
        "Haiku": functools.partial(_haiku, options),
        "PyTorch": functools.partial(make_torch, options),
        "PyTorch compiled": functools.partial(make_torch, options, compiled=True),
        "Keras": functools.partial(_keras, options),
    }
    measurements = side_by_side.measure(contestants, options)
    matmul, seconds = measurements.pop("matmul")
    peak = matmul.flops / min(seconds)
    print(f"peak, the fastest square {options.dtype} matmul: {peak / 1e9:,.0f} GFLOP/s")
    necessary = necessary_flops(options)
    side_by_side.print_table(
        measurements, ours, "share of peak", lambda seconds: f"{necessary / seconds / peak:.2f}"
    )


def necessary_flops(options: argparse.Namespace) -> int:
    """Return the operations of the matmuls that every implementation of the step needs.

    For each token: the recurrent matmul of each layer, the input matmul of each layer but the
    first, and the dense layer's. The first layer's input is a lookup, so it needs only the matmul
    of embedding table and input kernel, once per step. Each of these matmuls has two more of its
    size for the gradients, with respect to its input and to its kernel.
    """
    gates = 4 * options.hidden_size
    layers = (2 * options.num_layers - 1) * options.hidden_size * gates
    per_token = layers + options.hidden_size * options.vocabulary_size
    lookup = options.vocabulary_size * options.embedding_size * gates
    tokens = options.batch_size * options.window_length
    return 3 * 2 * (tokens * per_token + lookup)


def _batch(options: argparse.Namespace) -> np.ndarray:
    """Return inputs and targets, int32 [2, batch, time]."""
    shape = (2, options.batch_size, options.window_length)
    return np.random.default_rng(0).integers(options.vocabulary_size, size=shape, dtype=np.int32)


def _matmul(dtype: str) -> Work:
    import jax
    import jax.numpy as jnp

    device = side_by_side.jax_device()
    size = 2048 if device == "cpu" else 8192  # 2048 is too short on a GPU.
    square = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return Work(
        lambda: matmul(square, square).block_until_ready(),
        device,
        runs_per_turn=3,
        flops=2 * size**3,
    )


def _jax_work(step: Any, state: Any, batch: Any) -> Work:
    """Return the work of a jitted step that donates its state."""
    import jax

    memory.keep_freed_memory()
    batch = jax.device_put(batch)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, batch))

    return Work(run, side_by_side.jax_device())


def make_lstm_jax(
    options: argparse.Namespace, recurrence: str, regularized: bool = False, skipped: str = ""
) -> Work:
    """Return the step of this package, optionally with every regularizer, or all but one."""
    import jax

    from lstm_jax import batches, config, model, optimizer, train_step
    from lstm_jax.devices import parallel

    settings = config.default()
    settings.batches.batch_size = options.batch_size
    settings.model.embedding_size = options.embedding_size
    settings.model.hidden_size = options.hidden_size
    settings.model.num_layers = options.num_layers
    settings.model.recurrence = recurrence
    settings.model.dtype = options.dtype
    for name in settings.regularization if regularized else ():
        settings.regularization[name] = 0.1 * (name != skipped)
    complete = config.complete_config(settings)
    parallel.use_cores(complete)  # As in a training run.
    mesh = parallel.make_mesh(complete)
    lstm = model.make_model(complete.model, options.vocabulary_size)
    adam = optimizer.make_optimizer(complete.optimizer, total_steps=1)
    state = train_step.init_state(lstm, adam, jax.random.key(0), options.batch_size).place(mesh)
    inputs, targets = _batch(options)
    batch = batches.Batch(inputs, targets, starts=np.bool_(True))
    return _jax_work(train_step.make_train_step(lstm, adam, complete, mesh), state, batch)


def _jax_peer(
    options: argparse.Namespace, init: Callable[..., Any], apply: Callable[..., Any]
) -> Work:
    """Return the work for a model of another JAX library.

    Args:
      options: the sizes.
      init: maps a key and ids to parameters.
      apply: maps parameters and ids to logits.
    """
    import jax
    import optax

    optimizer = optax.adam(LEARNING_RATE)

    def loss_fn(params: Any, batch: Any) -> Any:
        inputs, targets = batch
        logits = apply(params, inputs).astype("float32")
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, _ = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    batch = _batch(options)
    params = init(jax.random.key(0), batch[0])
    state = params, optimizer.init(params), np.float32(0)
    return _jax_work(jax.jit(step, donate_argnums=0), state, tuple(batch))


def _flax(options: argparse.Namespace, cell: str) -> Work:
    import flax.linen as nn

    layers: list[Any] = [nn.Embed(options.vocabulary_size, options.embedding_size)]
    for _ in range(options.num_layers):
        layers.append(nn.RNN(getattr(nn, cell)(options.hidden_size, dtype=options.dtype)))
    layers.append(nn.Dense(options.vocabulary_size, dtype=options.dtype))
    model = nn.Sequential(layers)
    return _jax_peer(options, model.init, model.apply)


def _haiku(options: argparse.Namespace) -> Work:
    import haiku as hk

    side_by_side.set_haiku_dtype(options.dtype)

    def network(ids: Any) -> Any:
        hidden = hk.Embed(options.vocabulary_size, options.embedding_size)(ids.T)
        for _ in range(options.num_layers):
            lstm = hk.LSTM(options.hidden_size)
            hidden, _ = hk.dynamic_unroll(lstm, hidden, lstm.initial_state(options.batch_size))
        return hk.Linear(options.vocabulary_size)(hidden).swapaxes(0, 1)

    model = hk.without_apply_rng(hk.transform(network))
    return _jax_peer(options, model.init, model.apply)


def make_torch(options: argparse.Namespace, compiled: bool = False) -> Work:
    """Return the step in PyTorch, optionally with `torch.compile`."""
    import torch

    memory.keep_freed_memory()
    device, name = side_by_side.torch_device()
    embedding = torch.nn.Embedding(options.vocabulary_size, options.embedding_size)
    lstm = torch.nn.LSTM(
        options.embedding_size, options.hidden_size, options.num_layers, batch_first=True
    )
    dense = torch.nn.Linear(options.hidden_size, options.vocabulary_size)
    layers = torch.nn.ModuleList([embedding, lstm, dense]).to(device)
    optimizer = torch.optim.Adam(layers.parameters(), LEARNING_RATE, fused=True)
    inputs, targets = torch.tensor(_batch(options), dtype=torch.long, device=device)
    bfloat16 = options.dtype == "bfloat16"

    def compute_loss() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = dense(lstm(embedding(inputs))[0])
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

    return Work(run, name)


def _keras(options: argparse.Namespace) -> Work:
    import keras

    memory.keep_freed_memory()
    device = side_by_side.keras_device(options.dtype)
    lstm = [
        keras.layers.LSTM(options.hidden_size, return_sequences=True)
        for _ in range(options.num_layers)
    ]
    model = keras.Sequential(
        [
            keras.layers.Embedding(options.vocabulary_size, options.embedding_size),
            *lstm,
            keras.layers.Dense(options.vocabulary_size),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), loss)
    inputs, targets = _batch(options)
    return Work(lambda: model.train_on_batch(inputs, targets), device)


if __name__ == "__main__":
    main()
