"""Train one config on characters, bytes, words and parts of words for equal seconds.

    python benchmarks/units.py --out runs/units --seconds 180
    python benchmarks/units.py --config my_config.py --config.data.path=my.txt

For each kind of token a short run measures the time of a step, and a second run trains for the
number of steps that take --seconds; start, compilation and validation are not counted. OUT/units.md
has the table, in bits per character, which can be compared. The same command resumes an interrupted
comparison; all other flags are passed to every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import compare
from lstm_jax.run import metrics, workdir

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
    """Do the remaining work, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/units"))
    parser.add_argument("--seconds", type=float, default=180, help="[default: 180]")
    parser.add_argument("--seeds", type=int, default=1, help="[default: 1]")
    parser.add_argument("--config", default="experiments/quick.py")
    options, flags = parser.parse_known_args()
    lines = [
        "| tokens | vocabulary | epochs | seconds | validation | test |",
        "| --- |" + " ---: |" * 5,
    ]
    for unit, own in UNITS.items():
        given = [f"--config={options.config}", *own, *flags]
        train(options.out / f"{unit}_short", [*given, f"--config.max_steps={SHORT}"])
        steps = count_steps(options.out / f"{unit}_short", options.seconds)
        length = [f"--config.max_steps={steps}", "--config.num_epochs=1000"]
        runs = []
        for seed in range(options.seeds):
            directory = options.out / f"{unit}_{seed}"
            seconds = train(directory, [*given, *length, f"--config.seed={seed}"])
            runs.append(describe(directory, seconds))
        lines.append(make_row(unit, runs))
        (options.out / "units.md").write_text("\n".join(lines) + "\n")
    print((options.out / "units.md").read_text())


def train(directory: Path, flags: Sequence[str]) -> float:
    """Train in a directory, unless that was done; return the seconds of the process."""
    done = directory / "process_seconds.json"
    if not done.exists():
        command = [sys.executable, "-m", "lstm_jax.main", f"--workdir={directory}", *flags]
        start = time.monotonic()
        subprocess.run(command, check=True)
        done.write_text(json.dumps(time.monotonic() - start))
    return float(json.loads(done.read_text()))


def count_steps(short: Path, seconds: float) -> int:
    """Return the number of steps that take these seconds, by the short run."""
    batches = workdir.load_config(short).batches
    tokens = seconds * compare.measure_speed(short)
    return max(round(tokens / (batches.batch_size * batches.window_length)), 1)


def describe(directory: Path, seconds: float) -> list[float]:
    """Return the numbers of a run for its row: the losses are those of its best step."""
    rows = metrics.read_metrics(directory / workdir.METRICS)
    losses = {
        split: min(row["bits_per_character"] for row in rows if row["split"] == split)
        for split in ("validation", "test")
    }
    vocabulary = workdir.load_vocabulary(directory)
    epochs = max(row["epoch"] for row in rows)
    return [len(vocabulary), epochs, seconds, losses["validation"], losses["test"]]


def make_row(unit: str, runs: list[list[float]]) -> str:
    """Return a row of the table: means, of losses with the standard deviation."""
    columns = list(zip(*runs, strict=True))
    vocabulary, epochs, seconds, validation, test = map(statistics.mean, columns)
    row = [unit, f"{vocabulary:,.0f}", f"{epochs:.1f}", f"{seconds:.0f}"]
    for mean, values in ((validation, columns[3]), (test, columns[4])):
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        row.append(f"{mean:.3f}{spread}")
    return f"| {' | '.join(row)} |"


if __name__ == "__main__":
    main()
