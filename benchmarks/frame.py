"""Flags, runs of the package's commands, and means over seeds, which several benchmarks need."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def parse_flags(
    description: str | None, takes_fields: bool = False, **defaults: Any
) -> argparse.Namespace:
    """Parse a flag for each default, which has its type; a type instead makes it required.

    If `takes_fields`, `fields` are the flags --config.FIELD=VALUE.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        given: dict[str, Any] = {"type": type(default), "default": default}
        if isinstance(default, type):
            given = {"type": default, "required": True}
        parser.add_argument(f"--{name}", help="[default: %(default)s]", **given)
    options, fields = parser.parse_known_args()
    options.fields = fields
    for field in fields:
        if not takes_fields or not field.startswith("--config."):
            parser.error(f"unknown flag {field}")
    return options


def load_module(path: Path) -> ModuleType:
    """Return the module in the file of an experiment."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), module.__dict__)
    return module


def run_python(*words: object, directory: Path = ROOT) -> str:
    """Run a Python command, and return its standard output."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=directory, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def train(directory: Path, *flags: str) -> float:
    """Train into a directory, or resume; return the minutes of the process that completed it."""
    done = directory / "minutes.json"
    if not done.exists():
        start = time.perf_counter()
        run_python("-m", "lstm_jax.main", "--workdir", directory, *flags)
        done.write_text(json.dumps((time.perf_counter() - start) / 60))
    return float(json.loads(done.read_text()))


def evaluate(directory: Path, *flags: object) -> float:
    """Return the loss that `lstm_jax.evaluate` measures."""
    output = run_python("-m", "lstm_jax.evaluate", "--workdir", directory, *flags)
    return float(json.loads(output.splitlines()[-1])["loss"])


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
