"""Time a training step of every cell with each recurrence that it supports, by window length.

    python benchmarks/recurrences.py
    python benchmarks/recurrences.py --variants mingru,mlstm --lengths 512,4096

The models are those of experiments/cells.py. A batch has 4,096 tokens, as there, or is a single
longer window.
"""

import dataclasses
import runpy
import statistics

import jax
import numpy as np
import optax

from frame import ROOT, parse_flags, print_head, print_row, time_call
from lstm_jax import config as config_lib
from lstm_jax import model
from lstm_jax.devices import memory

VOCABULARY_SIZE = 67
TOKENS = 4096  # Of a batch.


def main() -> None:
    """Print the table."""
    experiment = runpy.run_path(str(ROOT / "experiments/cells.py"))
    variants = ",".join(experiment["VARIANTS"])
    options = parse_flags(__doc__, variants=variants, lengths="96,512,4096", rounds=5)
    memory.keep_freed_memory()
    print(f"{jax.devices()[0].device_kind}, {len(jax.devices())} devices\n")
    print_head("cell", "window", "recurrence", "ms")
    for name in options.variants.split(","):
        config = config_lib.complete_config(experiment["get_config"](name))
        for length in map(int, options.lengths.split(",")):
            shape = (max(TOKENS // length, 1), length)
            ids = np.random.default_rng(0).integers(VOCABULARY_SIZE, size=shape)
            for recurrence in ("scan", "parallel", "fused"):
                fields = dataclasses.replace(config.model, recurrence=recurrence)
                try:
                    made = model.make_model(fields, VOCABULARY_SIZE)
                    made.implementation()
                except ValueError:  # The cell has no such form.
                    continue
                seconds = time_step(made, ids, options.rounds)
                print_row(name, length, recurrence, f"{1000 * seconds:.1f}")


def time_step(made: model.LanguageModel, ids: np.ndarray, rounds: int) -> float:
    """Return the median seconds of a loss and its gradient."""

    def compute_loss(params: model.Params) -> jax.Array:
        logits, _ = model.apply(made, params, ids, made.initial_carry(len(ids)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    params = model.init_params(made, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(compute_loss))
    jax.block_until_ready(step(params))
    return statistics.median(
        time_call(lambda: jax.block_until_ready(step(params))) for _ in range(rounds)
    )


if __name__ == "__main__":
    main()
