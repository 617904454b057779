"""Train one config on characters, bytes, words and subwords for equal seconds.

    python benchmarks/units.py --out runs/units --seconds 180
    python benchmarks/units.py --config my_config.py --config.data.path=my.txt

It needs `pip install -e '.[bpe]'`. For each kind of token a short run measures the time of a step,
and a second run trains for the number of steps that take --seconds; start, compilation and
validation are not counted. The table is in bits per character, which can be compared. The same
command resumes an interrupted comparison; flags --config.FIELD=VALUE are passed to every run.
"""

import statistics
from pathlib import Path

from frame import count_steps, parse_flags, print_head, print_row, spread, train
from lstm_jax.run import workdir

SHORT = 40  # Steps of the run that measures the time of a step.
# Flags of each kind. Words have short windows in small batches, as in shakespeare_words.py: a text
# has fewer of them, and the layer for thousands of words takes most of a step.
UNITS = {
    "characters": ["--config.data.units=characters"],
    "bytes": ["--config.data.units=bytes"],
    "bpe": ["--config.data.units=bpe"],
    "words": [
        "--config.data.units=words",
        "--config.data.min_count=2",
        "--config.batches.batch_size=16",
        "--config.batches.window_length=32",
    ],
}


def main() -> None:
    """Do the remaining work; print a row of the table after each kind."""
    out, experiment = Path("runs/units"), "experiments/quick.py"
    options = parse_flags(__doc__, fields=True, out=out, seconds=180.0, seeds=1, config=experiment)
    print_head("tokens", "vocabulary", "epochs", "seconds", "validation", "test")
    for unit, fields in UNITS.items():
        given = [f"--config={options.config}", *fields, *options.fields]
        short = options.out / f"{unit}_short"
        train(short, *given, f"--config.max_steps={SHORT}")
        steps = count_steps([short], options.seconds)
        length = [f"--config.max_steps={steps}", "--config.num_epochs=1000"]
        runs = []
        for seed in range(options.seeds):
            directory = options.out / f"{unit}_{seed}"
            seconds = 60 * train(directory, *given, *length, f"--config.seed={seed}")
            runs.append((seconds, *read_losses(directory)))
        of_seconds, epochs, validation, test = zip(*runs, strict=True)
        means = f"{statistics.mean(epochs):.1f}", f"{statistics.mean(of_seconds):.0f}"
        vocabulary = len(workdir.load_vocabulary(directory))
        print_row(unit, f"{vocabulary:,}", *means, spread(validation), spread(test))


def read_losses(directory: Path) -> tuple[float, float, float]:
    """Return the epochs of a run, and the losses of its best step, validation and test."""
    rows = workdir.read_metrics(directory)
    validation, test = (
        min(row["bits_per_character"] for row in rows if row["split"] == split)
        for split in ("validation", "test")
    )
    return max(row["epoch"] for row in rows), validation, test


if __name__ == "__main__":
    main()
