"""Time a training step by the sizes of the model and of the batch, and draw it.

    python benchmarks/scaling.py --out runs/scaling

One size varies at a time: hidden units from 64 to 2,048, tokens per window, windows per batch, and
layers. Each point is the median of alternating rounds of this package (with `auto`) and of PyTorch,
as in train_step.py. The same command resumes an interrupted benchmark. OUT/scaling.svg is the plot;
the table has the ratios.
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import side_by_side
import train_step
from frame import compute_once, parse_flags, print_head, print_row

BASE = {"batch_size": 32, "window_length": 128, "embedding_size": 256, "hidden_size": 512}
BASE |= {"num_layers": 1, "vocabulary_size": 67}
SIZES = {
    "hidden_size": (64, 128, 256, 512, 1024, 2048),
    "window_length": (32, 64, 128, 256, 512),
    "batch_size": (8, 16, 32, 64, 128),
    "num_layers": (1, 2, 3, 4),
}
LABELS, DTYPES = ("lstm-jax", "PyTorch"), ("float32", "bfloat16")
Points = dict[str, list[float]]  # Seconds of the two libraries, by dtype, axis and size.


def main() -> None:
    """Measure the remaining points; print the table and draw the plot."""
    options = parse_flags(__doc__, out=Path("runs/scaling"), rounds=5)
    options.out.mkdir(parents=True, exist_ok=True)
    points: Points = {}
    for dtype, (axis, sizes) in itertools.product(DTYPES, SIZES.items()):
        for size in sizes:
            point = functools.partial(measure, {**BASE, axis: size}, dtype, options.rounds)
            file = options.out / f"{dtype}_{'_'.join(map(str, {**BASE, axis: size}.values()))}.json"
            points[f"{dtype} {axis} {size}"] = compute_once(file, point)
    print_head("", "lstm-jax, ms", "PyTorch, ms", "ratio")
    for key, (ours, theirs) in points.items():
        print_row(key, f"{1000 * ours:.1f}", f"{1000 * theirs:.1f}", f"{ours / theirs:.2f}")
    draw(points).savefig(options.out / "scaling.svg")
    print(f"\nWrote {options.out / 'scaling.svg'}")


def measure(sizes: dict[str, int], dtype: str, rounds: int) -> list[float]:
    """Return the median seconds of a step in this package and in PyTorch."""
    options = argparse.Namespace(**sizes, tie_embeddings=0, dtype=dtype, rounds=rounds, only="")
    contestants: dict[str, side_by_side.Make] = {
        LABELS[0]: functools.partial(train_step.make_lstm_jax, recurrence="auto"),
        LABELS[1]: train_step.make_torch,
    }
    measured = side_by_side.measure(contestants, options)
    return [side_by_side.find_medians(measured[label]).seconds for label in LABELS]


def draw(points: Points) -> Figure:
    """Draw milliseconds by size, with the growth that the arithmetic has as a thin line."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(len(DTYPES), len(SIZES), sharex="col", squeeze=False)
    for row, dtype in zip(axes, DTYPES, strict=True):
        for plot, (axis, sizes) in zip(row, SIZES.items(), strict=True):
            seconds = np.array([points[f"{dtype} {axis} {size}"] for size in sizes])
            for label, color, values in zip(LABELS, ("#0072B2", "#D55E00"), seconds.T, strict=True):
                plot.loglog(sizes, 1000 * values, "o-", markersize=3, color=color, label=label)
            growth = (np.array(sizes) / sizes[-1]) ** (2 if axis == "hidden_size" else 1)
            plot.loglog(sizes, 1000 * seconds[-1, 0] * growth, ":", color="#888888", linewidth=1)
            plot.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
            plot.minorticks_off()
            plot.grid(alpha=0.3)
        row[0].set_ylabel(f"{dtype}, ms a step")
    for plot, axis in zip(axes[-1], SIZES, strict=True):
        plot.set_xlabel(axis.replace("_", " "))
    axes[0, 0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
