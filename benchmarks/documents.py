"""Train on a text of documents, with and without a restart of the carry at each of them.

    python benchmarks/documents.py --seeds 3
    python benchmarks/documents.py --config my_config.py --epochs 2 --hidden_size 128

Every model is measured in both ways: each document from the initial carry, as `evaluate` does; and
the whole text with the carry kept. A row is printed after each model, and the means at the end.
"""

import runpy

import jax

from frame import make_step, parse_flags, print_head, print_row, spread
from lstm_jax import batches, loss
from lstm_jax.config import change_fields, complete_config
from lstm_jax.data import texts
from lstm_jax.model import make_model

SPLITS = ("validation", "test")


def main() -> None:
    """Train and measure all models."""
    experiment = "experiments/shakespeare_speeches.py"
    options = parse_flags(__doc__, config=experiment, seeds=1, epochs=0, hidden_size=0)
    config = complete_config(runpy.run_path(options.config)["get_config"]())
    fields = {
        "num_epochs": options.epochs,
        "model.hidden_size": options.hidden_size,
        "mesh.data": 1,
    }
    config = change_fields(config, {name: value for name, value in fields.items() if value})
    splits = texts.load_texts(config.data)
    vocabulary = splits.vocabulary
    ids, _ = splits.encode(vocabulary)
    measured = [f"{way}, {split}" for way in ("restarted", "kept") for split in SPLITS]
    print_head("training", "seed", *measured)
    both = [
        make_model(config.model, len(vocabulary), stop_id) for stop_id in (vocabulary.stop_id, None)
    ]
    rows: dict[str, list[list[float]]] = {"restarted": [], "kept": []}
    for seed in range(options.seeds):
        for name, of_name in rows.items():
            stop_id = vocabulary.stop_id if name == "restarted" else None
            of_seed = change_fields(config, {"seed": seed})
            iterator, steps_per_epoch = batches.make_batches(ids["train"], config.batches, seed)
            steps = config.num_epochs * steps_per_epoch
            state, step, _ = make_step(of_seed, len(vocabulary), steps, stop_id)
            for _ in range(steps):
                state = jax.block_until_ready(step(state, next(iterator)))
            losses = [
                loss.compute_loss(lstm, state.params, ids[split])
                for lstm in both
                for split in SPLITS
            ]
            of_name.append(losses)
            print_row(name, seed, *(f"{value:.4f}" for value in losses))
    for name, of_name in rows.items():
        print_row(name, "all", *map(spread, zip(*of_name, strict=True)))


if __name__ == "__main__":
    main()
