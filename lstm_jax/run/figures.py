"""Plot the losses of a run over its steps."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lstm_jax.data import files
from lstm_jax.run.metrics import Row

if TYPE_CHECKING:  # Importing it takes half a second: the first plot does.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette, which color-blind readers can distinguish.
_COLORS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73"}


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
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
