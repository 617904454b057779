"""Train variants of an experiment with several seeds, and print their losses.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --seeds 1 --only "learning rate 4e-3" "no weight decay"

Each variant changes fields of experiments/quick.py. A row has means over seeds: the validation
loss, by which variants are compared; the loss of the last 10 % of the text, validation and test as
one text, with the carry kept and by windows of 256 (`--context 256`), all in nats per character;
and the minutes of the training process. The same command resumes a benchmark that was stopped;
minutes are then those after the last start.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/ablations")
    parser.add_argument("--text", type=Path, help="another text file [default: Tiny Shakespeare]")
    options = parser.parse_args()
    print("| | seeds | validation | last 10 % | windows of 256 | minutes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.only:
        flags = [f"--config.{field}" for field in VARIANTS[name]]
        directory = options.workdir / name.replace(" ", "_")
        if options.text:
            flags.append(f"--config.data.path={options.text.absolute()}")
            directory = options.workdir / options.text.stem / directory.name
        rows = [_measure(directory / str(seed), seed, flags) for seed in range(options.seeds)]
        losses = (_describe([row[key] for row in rows]) for key in ("validation", "all", "windows"))
        minutes = statistics.mean(row["minutes"] for row in rows)
        print(f"| {name} | {len(rows)} | {' | '.join(losses)} | {minutes:.1f} |", flush=True)


def _measure(directory: Path, seed: int, flags: list[str]) -> dict[str, float]:
    """Train a variant with a seed, or resume it; return its losses, and minutes of training."""
    path = directory / "ablation.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    start = time.perf_counter()
    experiment = ("--config", "experiments/quick.py", f"--config.seed={seed}")
    _run("main", *experiment, "--workdir", directory, *flags)
    row = {"minutes": (time.perf_counter() - start) / 60}
    for key, split, *more in (
        ("validation", "validation"),
        ("all", "validation+test"),
        ("windows", "validation+test", "--context=256"),
    ):
        output = _run("evaluate", "--workdir", directory, "--split", split, *more)
        row[key] = json.loads(output.splitlines()[-1])["loss"]
    path.write_text(json.dumps(row))
    return row


def _run(command: str, *words: Any) -> str:
    """Run a command of the package, and return its standard output."""
    line = [sys.executable, "-m", f"lstm_jax.{command}", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _describe(values: list[float]) -> str:
    """Return the mean, with the standard deviation if there is one."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
