"""Time a population and the single runs of its members, compilation included.

    python benchmarks/population.py
    python benchmarks/population.py --members 8 --steps 200 --hidden_sizes 64,128

Both compute training steps like those of quick.py on random text, in turn. Every round recompiles.
A single run is computed as in `lstm_jax.main`, with its batch divided over the cores if that is
faster.
"""

import statistics
from typing import Any

import jax
import numpy as np

from frame import make_step, parse_flags, print_head, print_row, time_call
from lstm_jax import batches, config, model, optimizer, train_step
from lstm_jax.recurrences.processor import count_cores
from lstm_jax.sweep import stacked

VOCABULARY_SIZE = 67


def main() -> None:
    """Measure and print the table."""
    options = parse_flags(__doc__, members=8, steps=200, rounds=3, hidden_sizes="64,128")
    # Measure every compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", count_cores())
    device = jax.devices()[0].device_kind
    sizes = f"{options.members} members, {options.steps} steps"
    print(f"{device}, {len(jax.devices())} devices, {sizes}\n")
    print_head("hidden units", "a single run, s", "a member of the population, s", "ratio")
    for hidden_size in map(int, options.hidden_sizes.split(",")):
        members = [make_config(hidden_size, seed) for seed in range(options.members)]
        seconds = []
        for _ in range(options.rounds):
            jax.clear_caches()
            alone = time_call(take_steps, members[0], options.steps)
            jax.clear_caches()
            member = time_call(take_steps_together, members, options.steps) / len(members)
            seconds.append((alone, member, member / alone))
        medians = map(statistics.median, zip(*seconds, strict=True))
        print_row(hidden_size, *(f"{median:.2f}" for median in medians))


def make_config(hidden_size: int, seed: int) -> config.Config:
    """Return the config of a member."""
    settings = config.default()
    settings.seed = seed
    settings.batches.update(batch_size=32, window_length=96)
    settings.model.update(embedding_size=64, hidden_size=hidden_size)
    settings.optimizer.update(
        learning_rate=4e-3 / (1 + seed), schedule="cosine", max_gradient_norm=1.0
    )
    return config.complete_config(settings)


def make_batch(settings: config.Config, *members: int) -> batches.Batch:
    """Return random ids, [*members, batch, time]."""
    shape = (2, *members, settings.batches.batch_size, settings.batches.window_length)
    inputs, targets = np.random.default_rng(0).integers(VOCABULARY_SIZE, size=shape, dtype=np.int32)
    starts: Any = np.zeros(members, np.bool_)[()]
    return batches.Batch(inputs, targets, starts)


def take_steps(settings: config.Config, steps: int) -> None:
    """Take the training steps of a single run."""
    state, step, _ = make_step(settings, VOCABULARY_SIZE, steps)
    batch = make_batch(settings)
    for _ in range(steps):
        state = jax.block_until_ready(step(state, batch))


def take_steps_together(members: list[config.Config], steps: int) -> None:
    """Take the training steps of all members."""
    mesh = stacked.make_mesh(len(members))
    made = model.make_model(members[0].model, VOCABULARY_SIZE)
    step = stacked.make_population_step(members[0], made, steps, mesh)
    traced = stacked.stack_hyperparameters(members, mesh)
    states = [
        train_step.init_state(
            made,
            optimizer.make_optimizer(each.optimizer, steps),
            jax.random.key(each.seed),
            each.batches.batch_size,
        )
        for each in members
    ]
    state, batch = stacked.stack(states, mesh), make_batch(members[0], len(members))
    for _ in range(steps):
        state = jax.block_until_ready(step(traced, state, batch))


if __name__ == "__main__":
    main()
