"""Train variants of an experiment with several seeds, and print their losses.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --seeds 1 --only "learning rate 2e-2,no weight decay"

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
    "learning rate 2e-2": ["optimizer.learning_rate=2e-2"],
    "cosine schedule": ["optimizer.schedule=cosine"],
    "no weight decay": ["optimizer.weight_decay=0.0"],
    "embeddings in ±0.05": ["model.initial_embedding=0.05"],
    "output bias zero": ["model.initial_bias=zeros"],
    "no dropout": ["regularization.embedding_dropout=0.0", "regularization.output_dropout=0.0"],
    "output dropout 0.3": ["regularization.output_dropout=0.3"],
    "two layers of 288": ["model.num_layers=2", "model.hidden_size=288"],
    "two layers of 288 with skip connections": [
        "model.num_layers=2",
        "model.hidden_size=288",
        "model.skip_connections=True",
    ],
    "averaged weights": ["optimizer.average_decay=0.998"],
}
END = "--split=validation+test"  # The last 10 % of the text.


def main() -> None:
    """Train all variants in turn; print a row of the table after each."""
    names, out = ",".join(VARIANTS), ROOT / "runs/ablations"
    options = parse_flags(__doc__, True, seeds=3, only=names, workdir=out)
    print_head("", "seeds", "validation", "last 10 %", "windows of 256", "minutes")
    for name in options.only.split(","):
        flags = [f"--config.{field}" for field in VARIANTS[name]]
        rows = []
        for seed in range(options.seeds):
            directory: Path = options.workdir / name.replace(" ", "_") / str(seed)
            experiment = ("--config", "experiments/quick.py", f"--config.seed={seed}")
            minutes = train(directory, *experiment, *flags, *options.fields)
            splits = ["--split=validation"], [END], [END, "--context=256"]
            rows.append((*(evaluate(directory, *of_split) for of_split in splits), minutes))
        *losses, of_seeds = zip(*rows, strict=True)
        print_row(name, len(rows), *map(spread, losses), f"{statistics.mean(of_seeds):.1f}")


if __name__ == "__main__":
    main()
