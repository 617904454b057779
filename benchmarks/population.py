"""Time a population and the single runs of its members, compilation included.

    python benchmarks/population.py
    python benchmarks/population.py --members 8 --steps 200 --hidden_sizes 64,128

Both compute training steps like those of quick.py on random text, in turn. Every round recompiles.
A single run is computed as in `lstm_jax.main`, with its batch divided over the cores if that is
faster.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from frame import parse_flags, print_head, print_row
from lstm_jax import batches, config, model, optimizer, train_step
from lstm_jax.devices import memory, parallel
from lstm_jax.recurrences.processor import count_cores
from lstm_jax.sweep import stacked

VOCABULARY_SIZE = 67


def main() -> None:
    """Measure and print the table."""
    options = parse_flags(__doc__, members=8, steps=200, rounds=3, hidden_sizes="64,128")
    # Measure every compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", count_cores())
    memory.keep_freed_memory()
    device = jax.devices()[0].device_kind
    sizes = f"{options.members} members, {options.steps} steps"
    print(f"{device}, {len(jax.devices())} devices, {sizes}\n")
    print_head("hidden units", "a single run, s", "a member of the population, s", "ratio")
    for hidden_size in map(int, options.hidden_sizes.split(",")):
        alone, member = [], []
        for _ in range(options.rounds):
            alone.append(_time(_alone, hidden_size, options.steps))
            seconds = _time(_together, hidden_size, options.steps, options.members)
            member.append(seconds / options.members)
        ratios = [m / a for m, a in zip(member, alone, strict=True)]
        medians = map(statistics.median, (alone, member, ratios))
        print_row(hidden_size, *(f"{median:.2f}" for median in medians))


def _time(run: Callable[..., None], *sizes: int) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    run(*sizes)
    return time.perf_counter() - start


def _settings(hidden_size: int, seed: int = 0) -> config.Config:
    settings = config.default()
    settings.seed = seed
    settings.batches.batch_size = 32
    settings.batches.window_length = 96
    settings.model.embedding_size = 64
    settings.model.hidden_size = hidden_size
    settings.optimizer.learning_rate = 4e-3 / (1 + seed)
    settings.optimizer.schedule = "cosine"
    settings.optimizer.max_gradient_norm = 1.0
    return config.complete_config(settings)


def _state(settings: config.Config, steps: int) -> train_step.TrainState:
    return train_step.init_state(
        model.make_model(settings.model, VOCABULARY_SIZE),
        optimizer.make_optimizer(settings.optimizer, steps),
        jax.random.key(settings.seed),
        settings.batches.batch_size,
    )


def _batch(settings: config.Config, *members: int) -> batches.Batch:
    """Return random ids, [*members, batch, time]."""
    shape = (*members, settings.batches.batch_size, settings.batches.window_length + 1)
    ids = np.random.default_rng(0).integers(VOCABULARY_SIZE, size=shape, dtype=np.int32)
    starts: Any = np.zeros(members, np.bool_)[()]
    return batches.Batch(ids[..., :-1], ids[..., 1:], starts)


def _alone(hidden_size: int, steps: int) -> None:
    settings = _settings(hidden_size)
    mesh = parallel.make_mesh(settings)
    step = train_step.make_train_step(
        model.make_model(settings.model, VOCABULARY_SIZE),
        optimizer.make_optimizer(settings.optimizer, steps),
        settings,
        mesh,
    )
    state = _state(settings, steps).place(mesh)
    batch = _batch(settings)
    for _ in range(steps):
        state = jax.block_until_ready(step(state, batch))


def _together(hidden_size: int, steps: int, members: int) -> None:
    settings = [_settings(hidden_size, seed) for seed in range(members)]
    mesh = stacked.make_mesh(members)
    step = stacked.make_population_step(settings[0], VOCABULARY_SIZE, steps, mesh)
    traced = stacked.stack_hyperparameters(settings, mesh)
    state = stacked.stack([_state(each, steps) for each in settings], mesh)
    batch = _batch(settings[0], members)
    for _ in range(steps):
        state = jax.block_until_ready(step(traced, state, batch))


if __name__ == "__main__":
    main()
