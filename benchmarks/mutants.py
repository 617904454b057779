"""Change the numeric core at random places, one at a time, and see whether the quick tests fail.

    pip install cosmic-ray
    python benchmarks/mutants.py --number 300 --seed 0 --out runs/mutants

Cosmic Ray makes the mutants: other operators, comparisons, numbers, booleans and keywords. They are
drawn from all that it finds in the core, without those of `|`, which is in annotations, and of
decorators, which mostly compile or cache a function. For each, the tests of `make check` run in a
clone of the last commit, up to the first that fails; the files that name the changed module or its
folder most often run first. OUT/mutants.jsonl has a line for each, with its diff. The same command
resumes.
"""

import argparse
import concurrent.futures
import difflib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
CORE = (
    "cells/*.py",
    "batches.py",
    "controls.py",
    "dynamic.py",
    "generation.py",
    "loss.py",
    "model.py",
    "optimizer.py",
    "recurrences/fused.py",
    "regularization.py",
    "train_step.py",
    "vocabulary.py",
)
EXCLUDED = re.compile("BitOr|Decorator|NoOp|variable", re.IGNORECASE)
SECONDS = 180, 600  # The limits of a few files and of the others; a mutant may loop without end.


class Mutant(NamedTuple):
    """One change: the n-th place in a module at which an operator of Cosmic Ray applies."""

    module: str
    operator: str
    occurrence: int


def main() -> None:
    """Run the tests for the mutants that have no result yet, and print the share that is found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/mutants"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out.resolve() / "mutants.jsonl"
    mutants = random.Random(options.seed).sample(list_mutants(), options.number)
    lines = results.read_text().splitlines() if results.exists() else []
    known = {Mutant(*row["mutant"]): bool(row["found"]) for row in map(json.loads, lines)}
    waiting = [mutant for mutant in mutants if mutant not in known]

    def work(worker: int) -> None:
        clone = options.out.resolve() / f"clone_{worker}"
        if not clone.exists():
            make_clone(clone)
        while waiting:
            mutant = waiting.pop(0)
            known[mutant], row = test_mutant(mutant, clone)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{len(known)}: {'found' if known[mutant] else 'SURVIVED'} {mutant}", flush=True)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(work, range(options.workers)))
    found = sum(known[mutant] for mutant in mutants)
    print(f"{found} of {len(mutants)} mutants found: {found / len(mutants):.1%}")


def list_mutants() -> list[Mutant]:
    """Return all mutants of the core, in a fixed order."""
    mutants = []
    names = [name for name in plugins.operator_names() if not EXCLUDED.search(name)]
    for path in sorted(path for pattern in CORE for path in (ROOT / "lstm_jax").glob(pattern)):
        nodes = list(ast_nodes(get_ast(path.read_text())))
        for name in sorted(names):
            operator = plugins.get_operator(name)()
            places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            module = str(path.relative_to(ROOT))
            mutants += [Mutant(module, name, i) for i in range(places)]
    return mutants


def make_clone(clone: Path) -> None:
    """Clone the last commit, with the compiled programs of the tests."""
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    if (ROOT / ".pytest_cache").exists():
        shutil.copytree(ROOT / ".pytest_cache", clone / ".pytest_cache")


def test_mutant(mutant: Mutant, clone: Path) -> tuple[bool, dict[str, object]]:
    """Return whether a test fails with this mutant, and a row that describes it."""
    path = clone / mutant.module
    code = path.read_text()
    mutated = mutate_code(code, plugins.get_operator(mutant.operator)(), mutant.occurrence)
    names = "|".join({path.stem, path.parent.stem} - {"lstm_jax"})
    word = re.compile(rf"\b({names})\b", re.IGNORECASE)
    tests = sorted(
        (clone / "tests").glob("test_*.py"), key=lambda test: -len(word.findall(test.read_text()))
    )
    path.write_text(mutated)
    try:
        # A few files are imported sooner than all.
        failed = run_tests(clone, tests[:4], SECONDS[0]) or run_tests(clone, tests[4:], SECONDS[1])
    finally:
        path.write_text(code)
    lines = difflib.unified_diff(code.splitlines(), mutated.splitlines(), n=0, lineterm="")
    return bool(failed), {"mutant": mutant, "found": failed, "diff": list(lines)[2:]}


def run_tests(clone: Path, tests: Sequence[Path], seconds: float) -> str:
    """Return the first test that fails, or another reason why they do not pass; "" if they do."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not process and not slow"]
    environment = {**os.environ, "PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [*command, *map(str, tests)],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "timeout"
    match = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return (match[1] if match else f"exit {process.returncode}") if process.returncode else ""


if __name__ == "__main__":
    main()
