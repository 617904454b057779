"""What a run measured: metrics.jsonl, TensorBoard events, and the curves as a picture."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73"}


class MetricsWriter:
    """Appends to metrics.jsonl and to the TensorBoard events of a working directory."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens both for a run that goes on after `step`.

        Args:
          path: of metrics.jsonl; the events are written beside it.
          step: TensorBoard hides events of later steps, which an interrupted run left behind.
        """
        self._lines = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(path.parent),
            purge_step=step + 1 if step else None,
            # Two files opened within a second would have the same name without it.
            filename_suffix=f".{step}",
        )

    def write(self, step: int, epoch: float, split: str, loss: float, **extra: float) -> None:
        """Records a loss.

        Args:
          step: training steps done.
          epoch: passes over the training text done, with fractions.
          split: "train", "validation" or "test".
          loss: in nats per token.
          **extra: other figures, such as tokens_per_second.
        """
        row = {"step": step, "epoch": round(epoch, 6), "split": split, "loss": loss, **extra}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in {"loss": loss, **extra}.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._events.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the losses of all splits over steps, as a PNG file written whole or not at all."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for split, style in (("train", "-"), ("validation", "o-"), ("test", "*")):
        points = [
            (row["step"], row["loss"]) for row in rows if row["split"] == split and row["step"]
        ]
        if points:
            steps, losses = zip(*points, strict=True)
            label = f"{split}, last {losses[-1]:.3f}"
            size = {"o-": 4.0, "*": 12.0}.get(style, 0.0)
            axes.plot(steps, losses, style, markersize=size, color=_COLOURS[split], label=label)
    # The first steps fall from ln(vocabulary) and would squeeze the rest against the bottom.
    later = sorted(row["loss"] for row in rows)
    top = later[int(0.97 * (len(later) - 1))]
    axes.set_ylim(top=top + 0.05 * (top - later[0]) if top > later[0] else None)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    os.replace(partial, path)
