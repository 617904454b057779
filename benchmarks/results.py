"""Train rows of the tables in docs/results.md again, and compare their losses with those stated.

    make results ROWS=quick.py
    python benchmarks/results.py --rows quick_variants.py:dropout --seeds 1

A row is a config; flags --config.FIELD=VALUE change all rows. Its columns are those of its table,
means and standard deviations over the seeds, in nats per character (for Penn Treebank in bits, or
the perplexity of words): the losses of `evaluate` for the validation split, for the test split, and
for the last 10 % of the text, validation and test as one text, also with `--context 256` or
`--dynamic`. Below is whether each mean lies within two standard deviations of the one stated, or
within 1 % of a single run. The same command resumes.
"""

import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from frame import ROOT, evaluate, parse_flags, print_head, print_row, spread, train

ROWS = (  # Configs in experiments/.
    "quick.py",
    "quick_one_layer.py",
    "quick_variants.py:dropout",
    "quick_variants.py:no_skip_connections",
    "quick_variants.py:no_weight_decay",
    "quick_variants.py:activation",
    "shakespeare_best.py",
    "penn_treebank.py",
    "penn_treebank.py:512",
    "penn_treebank.py:1024",
    "penn_treebank_words.py",
    "penn_treebank_words.py:944",
)
_MEASURES = {"penn_treebank": "bits_per_character", "penn_treebank_words": "perplexity"}
_END = "--split=validation+test"
COLUMNS = {
    "validation": ["--split=validation"],
    "test": ["--split=test"],
    "last 10 %": [_END],
    "last 10 %, `--context 256`": [_END, "--context=256"],
    "last 10 %, `--dynamic`": [_END, "--dynamic"],
}


class Stated(NamedTuple):
    """A loss in a table: the mean over seeds, and its standard deviation."""

    mean: float
    deviation: float


def main() -> None:
    """Train and measure what is not measured yet; print a row and a comparison after each."""
    paths = {"page": ROOT / "docs/results.md", "workdir": ROOT / "runs/results"}
    options = parse_flags(__doc__, fields=True, rows=",".join(ROWS), seeds=3, **paths)
    names = options.rows.split(",")
    if unknown := set(names) - set(ROWS):
        sys.exit(f"there is no row {unknown.pop()!r}; there are {', '.join(ROWS)}")
    for name in names:
        stated = read_stated(options.page.read_text(encoding="utf-8"), name)
        experiment = f"experiments/{name}"
        runs = []
        for seed in range(options.seeds):
            directory: Path = options.workdir / re.sub(r"\W+", "_", name) / str(seed)
            flags = ["--config", experiment, f"--config.seed={seed}", *options.fields]
            minutes = train(directory, *flags)
            measure = _MEASURES.get(name.partition(".py")[0], "loss")
            measured = (evaluate(directory, *COLUMNS[x], measure=measure) for x in stated)
            runs.append((*measured, minutes))
        *losses, all_minutes = zip(*runs, strict=True)
        print_head(name, *stated, "minutes")
        print_row(f"{len(runs)} seeds", *map(spread, losses), spread(all_minutes, 1))
        print_row("stated", *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in stated.values()), "")
        pairs = zip(losses, stated.values(), strict=True)
        print_row("within the spread", *(compare(x, y) for x, y in pairs), "")


def compare(losses: tuple[float, ...], stated: Stated) -> str:
    """Say whether a mean is within two standard deviations, the larger ones, of the stated one."""
    spreads = stated.deviation, 0.001, *([statistics.stdev(losses)] if len(losses) > 1 else [])
    deviations = abs(statistics.mean(losses) - stated.mean) / max(spreads)
    return f"{'yes' if deviations <= 2 else 'no'}, {deviations:.1f} deviations away"


def read_stated(page: str, name: str) -> dict[str, Stated]:
    """Return the losses of a row of a page's tables, by column, or raise `ValueError`."""
    stated: dict[str, Stated] = {}
    head: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        head = (head or cells) if cells else []
        if cells and cells[0].strip("`").partition("`")[0] == name:
            for column, cell in zip(head, cells, strict=True):
                match = re.fullmatch(r"([\d.]+)(?: ± ([\d.]+))?", cell)
                if match and column in COLUMNS:
                    mean = float(match[1])
                    stated.setdefault(column, Stated(mean, float(match[2] or mean / 200)))
    if not stated:
        raise ValueError(f"there is no row {name!r} with losses in the page")
    return stated


if __name__ == "__main__":
    main()
