"""Change the numeric core at random places, one at a time, and see whether the quick tests fail.

    pip install cosmic-ray
    python benchmarks/mutants.py --number 300 --seed 0 --out runs/mutants

Cosmic Ray makes the mutants: other operators, comparisons, numbers, booleans and keywords. They are
drawn from all that it finds in the core, without those of `|`, which is in annotations, and of
decorators, which mostly compile or cache a function. For each, the tests of `make check` run in a
clone of the last commit, up to the first that fails; the files that name the changed module or its
folder most often run first. Each worker has its own clone. OUT/mutants.jsonl has a line for each
mutant, with its diff. The same command resumes.
"""

import json
import queue
import random
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import use_mutation
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import TestOutcome

from frame import ROOT, parse_flags

CORE = re.compile(
    r"lstm_jax/(cells/\w+|batches|controls|dynamic|generation|loss|model|optimizer|"
    r"recurrences/fused|regularization|train_step|vocabulary)\.py"
)
EXCLUDED = re.compile("BitOr|Decorator|NoOp|variable", re.IGNORECASE)


class Mutant(NamedTuple):
    """One change: the n-th place in a module at which an operator of Cosmic Ray applies."""

    module: str
    operator: str
    occurrence: int


def main() -> None:
    """Run the tests for the mutants that have no result yet, and print the share that is found."""
    options = parse_flags(__doc__, number=300, seed=0, workers=2, out=Path("runs/mutants"))
    out = options.out.resolve()
    clones = [make_clone(out / f"clone_{k}") for k in range(options.workers)]
    results, mutants = out / "mutants.jsonl", list_mutants(clones[0])
    lines = results.read_text().splitlines() if results.exists() else []
    known = {Mutant(*row["mutant"]): bool(row["found"]) for row in map(json.loads, lines)}
    mutants = random.Random(options.seed).sample(mutants, options.number)
    idle: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for clone in clones:
        idle.put(clone)

    def test(mutant: Mutant) -> None:
        clone = idle.get()
        row = test_mutant(mutant, clone)
        idle.put(clone)
        known[mutant] = bool(row["found"])
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{len(known)}: {'found' if known[mutant] else 'SURVIVED'} {mutant}", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(test, [mutant for mutant in mutants if mutant not in known]))
    found = sum(known[mutant] for mutant in mutants)
    print(f"{found} of {len(mutants)} mutants found: {found / len(mutants):.1%}")


def list_mutants(clone: Path) -> list[Mutant]:
    """Return all mutants of the core, in a fixed order."""
    mutants = []
    names = [name for name in plugins.operator_names() if not EXCLUDED.search(name)]
    for path in sorted((clone / "lstm_jax").rglob("*.py")):
        module = str(path.relative_to(clone))
        nodes = list(ast_nodes(get_ast(path.read_text()))) if CORE.fullmatch(module) else []
        for name in sorted(names):
            operator = plugins.get_operator(name)()
            places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            mutants += [Mutant(module, name, i) for i in range(places)]
    return mutants


def make_clone(clone: Path) -> Path:
    """Clone the last commit, with the compiled programs of the tests, or repair the clone."""
    if clone.exists():  # An interruption may have left a mutant.
        subprocess.run(["git", "-C", clone, "checkout", "--quiet", "."], check=True)
        return clone
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    if (ROOT / ".pytest_cache").exists():
        shutil.copytree(ROOT / ".pytest_cache", clone / ".pytest_cache")
    return clone


def test_mutant(mutant: Mutant, clone: Path) -> dict[str, object]:
    """Return a row with the first test that fails with this mutant, and its diff."""
    path, operator = clone / mutant.module, plugins.get_operator(mutant.operator)()
    names = "|".join({path.stem, path.parent.stem} - {"lstm_jax"})
    word = re.compile(rf"\b({names})\b", re.IGNORECASE)
    tests = sorted(
        clone.glob("tests/test_*.py"), key=lambda test: -len(word.findall(test.read_text()))
    )
    command = f"{sys.executable} -m pytest -x -p no:xdist -m 'not process and not slow'"
    row: dict[str, object] = {"mutant": mutant, "found": ""}
    with use_mutation(path, operator, mutant.occurrence):
        diff = subprocess.check_output(["git", "-C", clone, "diff", "-U0"], text=True)
        row["diff"] = diff.splitlines()[4:]
        # A few files are imported sooner than all. A mutant may loop without end.
        for some, seconds in ((tests[:4], 600), (tests[4:], 1200)):
            line = f"cd {clone} && PYTHONPATH={clone} {command} {' '.join(map(str, some))}"
            outcome, output = run_tests(f"sh -c {shlex.quote(line)}", seconds)
            if outcome != TestOutcome.SURVIVED:
                match = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                row["found"] = match[1] if match else f"{outcome.value} {output[-80:]}"
                break
    return row


if __name__ == "__main__":
    main()
