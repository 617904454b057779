"""Plot losses: over the steps of a run, and by position in a window."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lstm_jax.data import files
from lstm_jax.run.metrics import Row

if TYPE_CHECKING:  # Importing it takes half a second: the first plot does.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette, which color-blind readers can distinguish.
_COLORS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73"}


def save_figure(figure: "Figure", path: Path, dpi: float | str = "figure") -> None:
    """Write a figure as a PNG file, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    files.write_file(path, picture.getvalue())


def _make_figure(xlabel: str) -> tuple["Figure", "Axes"]:
    """Return a figure of losses with its axes."""
    from matplotlib.figure import Figure

    # Fixed margins, because a layout engine would double the time of drawing.
    figure = Figure(figsize=(8, 5), layout="none")  # type: ignore[arg-type]
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.11, top=0.97)
    axes = figure.add_subplot(xlabel=xlabel, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    return figure, axes


def draw_metrics(rows: Sequence[Row]) -> "Figure":
    """Return a figure of the losses of all splits over steps."""
    figure, axes = _make_figure("training step")
    rows = [row for row in rows if row["step"]]
    for split, style, size in (("train", ".-", 1), ("validation", "o-", 4), ("test", "*", 12)):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            steps, losses = zip(*points, strict=True)
            label = f"{split}, last {losses[-1]:.3f}"
            axes.plot(steps, losses, style, markersize=size, color=_COLORS[split], label=label)
    if axes.lines:
        axes.legend()
    # Cut off the first steps, which fall from ln(vocabulary size) and would flatten the rest.
    finite = [row for row in rows if math.isfinite(row["loss"])]
    if ordered := sorted(row["loss"] for row in finite):
        measured = [row["loss"] for row in finite if row["split"] != "train"]
        top = max([ordered[int(0.97 * (len(ordered) - 1))], *measured])
        if top > ordered[0]:
            margin = 0.05 * (top - ordered[0])
            axes.set_ylim(ordered[0] - margin, top + margin)
    return figure


def plot_positions(losses: np.ndarray, kept: float, path: Path) -> None:
    """Plot losses by position, and the loss with the carry kept, as a PNG file."""
    figure, axes = _make_figure("position in the window")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    positions = np.arange(1, len(losses) + 1)
    axes.plot(positions, losses, ".", color="#56B4E9", alpha=0.6, label="each position")
    # Means over ranges of positions, which grow by a factor of about the square root of two.
    number = 2 * len(losses).bit_length()
    ranges = np.geomspace(1, len(losses) + 1, number, endpoint=False)
    starts = np.unique(ranges.astype(int)) - 1
    sizes = np.diff(np.append(starts, len(losses)))
    means = [np.add.reduceat(values, starts) / sizes for values in (positions, losses)]
    axes.plot(*means, "o-", color=_COLORS["train"], label="mean over a range of positions")
    label = f"carry kept throughout the text: {kept:.3f}"
    axes.axhline(kept, linestyle="--", color=_COLORS["validation"], label=label)
    axes.legend()
    save_figure(figure, path, dpi=150)
