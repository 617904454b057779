"""Flags, runs of the package's commands, times and tables, which several benchmarks need."""

import argparse
import json
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lstm_jax import cells
from lstm_jax.run import workdir

ROOT = Path(__file__).parents[1]


def parse_flags(doc: str | None, fields: bool = False, **defaults: Any) -> argparse.Namespace:
    """Parse a flag for each keyword argument: its default, or a type, which makes it required.

    With `fields`, flags --config.FIELD=VALUE are allowed, too: they are `fields` of the result.
    """
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=kind)
    for name, default in defaults.items():
        given: dict[str, Any] = {"type": type(default), "default": default}
        if isinstance(default, type):
            given = {"type": default, "required": True}
        parser.add_argument(f"--{name}", help="[default: %(default)s]", **given)
    options, given_fields = parser.parse_known_args()
    options.fields = given_fields
    for name, value in vars(options).items():
        if isinstance(value, Path):  # Commands run in ROOT.
            setattr(options, name, value.resolve())
    if unknown := [f for f in given_fields if not (fields and f.startswith("--config."))]:
        parser.error(f"unknown flag {unknown[0]}")
    return options


def run_python(*words: object, directory: Path = ROOT) -> str:
    """Run a Python command, and return its standard output."""
    command = [sys.executable, *map(str, words)]
    return subprocess.check_output(command, cwd=directory, text=True)


def time_call(run: Callable[..., object], *arguments: Any, **options: Any) -> float:
    """Return the seconds of a call."""
    return timeit.timeit(lambda: run(*arguments, **options), number=1)


def compute_once(file: Path, compute: Callable[[], Any]) -> Any:
    """Return a result from a JSON file, or else compute it and write it there."""
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())


def train(directory: Path, *flags: str) -> float:
    """Train into a directory, or resume; return the minutes of the process that completed it."""
    directory.mkdir(parents=True, exist_ok=True)
    known = directory / "flags"
    if not (known.exists() and (directory / workdir.CONFIG).exists()):  # Else they are known.
        known.write_text(json.dumps(flags))
    if (given := json.loads(known.read_text())) != list(flags):
        sys.exit(f"{directory} was trained with {' '.join(given)}: use another directory")
    command, file = ("-m", "lstm_jax.main", "--workdir", directory, *flags), directory / "minutes"
    return float(compute_once(file, lambda: time_call(run_python, *command) / 60))


def evaluate(directory: Path, *flags: object, measure: str = "loss") -> float:
    """Return the loss, or another field of its output, that `lstm_jax.evaluate` measures."""
    cell = workdir.load_config(directory).model.cell
    own = ["--cell", cell] if cells.names_file(cell) else []
    output = run_python("-m", "lstm_jax.evaluate", "--workdir", directory, *own, *flags)
    return float(json.loads(output.splitlines()[-1])[measure])


def measure_speed(directory: Path) -> float:
    """Return the median of the tokens a second that a run logged in training; 0 if it has none."""
    rows = workdir.read_metrics(directory)
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return statistics.median(speeds or [0.0])


def count_steps(directories: Iterable[Path], seconds: float) -> int:
    """Return the number of steps that take these seconds in the fastest of several runs."""
    fastest = max(directories, key=measure_speed)
    sizes = workdir.load_config(fastest).batches
    return max(round(seconds * measure_speed(fastest) / sizes.batch_size / sizes.window_length), 1)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean, with the standard deviation if there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def print_row(*cells: object) -> None:
    """Print a row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*cells: str) -> None:
    """Print the first row of a table, of words, and the line below it."""
    print_row(*cells)
    print(f"| --- |{' ---: |' * (len(cells) - 1)}", flush=True)
