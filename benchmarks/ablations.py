"""Train variants of an experiment with several seeds, and print their losses.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --seeds 1 --only "learning rate 4e-3,no weight decay"

Each variant changes fields of experiments/quick.py; flags --config.FIELD=VALUE change all. A row
has means over seeds: the validation loss, by which variants are compared; the loss of the last 10 %
of the text, validation and test as one text, with the carry kept and by windows of 256 (`--context
256`), all in nats per character; and the minutes of the training process. The same command resumes
a benchmark that was stopped; minutes are then those after the last start.
"""

import statistics
from pathlib import Path

from frame import ROOT, evaluate, parse_flags, print_head, print_row, spread, train

VARIANTS = {
    "quick.py": [],
    "windows of 96": ["batches.window_length=96"],
    "batches of 32 windows of 64": ["batches.batch_size=32", "batches.window_length=64"],
    "learning rate 4e-3": ["optimizer.learning_rate=4e-3"],
    "learning rate 2e-2": ["optimizer.learning_rate=2e-2"],
    "cosine schedule": ["optimizer.schedule=cosine"],
    "no weight decay": ["optimizer.weight_decay=0.0"],
    "weight decay 0.02": ["optimizer.weight_decay=0.02"],
    "weight decay 0.3": ["optimizer.weight_decay=0.3"],
    "clipping at 1": ["optimizer.max_gradient_norm=1.0"],
    "b2 0.99": ["optimizer.b2=0.99"],
    "embeddings in ±0.05": ["model.initial_embedding=0.05"],
    "output bias zero": ["model.initial_bias=zeros"],
    "no dropout": [
        "regularization.embedding_dropout=0.0",
        "regularization.output_dropout=0.0",
    ],
    "output dropout 0.3": ["regularization.output_dropout=0.3"],
    "two layers of 288": ["model.num_layers=2", "model.hidden_size=288"],
    "two layers of 288 with skip connections": [
        "model.num_layers=2",
        "model.hidden_size=288",
        "model.skip_connections=True",
    ],
    "384 hidden units for 10 epochs": ["model.hidden_size=384", "num_epochs=10"],
    "averaged weights": ["optimizer.average_decay=0.998"],
    "float32": ["model.dtype=float32"],
}


def main() -> None:
    """Train all variants in turn; print a row of the table after each."""
    options = parse_flags(
        __doc__, True, seeds=3, only=",".join(VARIANTS), workdir=ROOT / "runs/ablations"
    )
    print_head("", "seeds", "validation", "last 10 %", "windows of 256", "minutes")
    for name in options.only.split(","):
        flags = [f"--config.{field}" for field in VARIANTS[name]]
        rows = []
        for seed in range(options.seeds):
            directory: Path = options.workdir / name.replace(" ", "_") / str(seed)
            experiment = ("--config", "experiments/quick.py", f"--config.seed={seed}")
            minutes = train(directory, *experiment, *flags, *options.fields)
            validation = evaluate(directory, "--split", "validation")
            end = ("--split", "validation+test")
            windows = evaluate(directory, *end, "--context=256")
            rows.append((validation, evaluate(directory, *end), windows, minutes))
        *losses, of_seeds = zip(*rows, strict=True)
        print_row(name, len(rows), *map(spread, losses), f"{statistics.mean(of_seeds):.1f}")


if __name__ == "__main__":
    main()
