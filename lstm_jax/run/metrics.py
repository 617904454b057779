"""Write and plot the losses of a run: metrics.jsonl, TensorBoard events and curves.png."""

import contextlib
import io
import json
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar, text

from lstm_jax.data import files
from lstm_jax.run.workdir import CURVES, METRICS, Row, read_metrics

# From Okabe and Ito's palette, which color-blind readers can distinguish.
_COLORS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73"}

# Called with each row, with the sample of a validation.
Watch = Callable[[Row], object]


class MetricsWriter(contextlib.ExitStack[None]):
    """Appends losses to metrics.jsonl, and losses and samples to TensorBoard events."""

    def __init__(self, directory: Path, step: int, watch: Watch = lambda row: None) -> None:
        """Open the files in the working directory of a run that is at `step`.

        The seconds of training continue from the last row.
        """
        super().__init__()
        self._watch, path = watch, directory / METRICS
        self._lines = self.enter_context(path.open("ab"))
        # A killed process or a full disk can leave half a line.
        self._lines.truncate(path.read_bytes().rfind(b"\n") + 1)
        rows = read_metrics(directory)
        self._start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        # tensorboardX's SummaryWriter has a thread, which loses its queue when the process is
        # killed and waits forever when the disk is full.
        # TensorBoard reads files in the order of their names, and the clock may have been set back.
        names = [file.name for file in directory.glob("events.out.tfevents.*")]
        name = max(f"events.out.tfevents.{time.time_ns()}", f"{max(names, default='')}.1")
        self._events = RecordWriter(str(directory / name))
        self.callback(self._events.close)
        self._add(file_version="brain.Event:2")
        # TensorBoard then hides later steps of earlier events, like `purge_step` of SummaryWriter.
        start = SessionLog(status=SessionLog.START)
        self._add(step=step + 1, session_log=start)

    def _add(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.flush()

    def write(
        self,
        step: int,
        epoch: float,
        split: str,
        loss: float,
        sample: str | None = None,
        **extra: float,
    ) -> None:
        """Record a loss in nats per token, and call `watch` with its row.

        For the arguments, see `Row`. The row comes last: a run that resumes records a test loss
        only if its row is missing.
        """
        numbers = {"loss": loss, **extra, "seconds": round(time.monotonic() - self._start, 3)}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row: Any = {"step": step, "epoch": round(epoch, 6), "split": split, **numbers, "time": now}
        values = [scalar(f"{split}/{name}", x).value[0] for name, x in numbers.items()]
        self._add(step=step, summary=Summary(value=values))
        copy = row.copy()  # `watch` may change it.
        if sample is not None:  # As Markdown, with every line indented, it is shown as it is.
            quoted = textwrap.indent(sample, "    ", lambda line: True)
            self._add(step=step, summary=text(f"{split}/sample", quoted))
            copy["sample"] = sample
        self._watch(copy)
        self._lines.write(f"{json.dumps(row)}\n".encode())
        self._lines.flush()


def plot_metrics(directory: Path) -> None:
    """Plot the losses of all splits over steps, from metrics.jsonl to curves.png, atomically.

    The first steps, which fall from ln(vocabulary size) and would flatten the rest, are left out.
    """
    from matplotlib.figure import Figure  # Importing it takes half a second.

    rows = read_metrics(directory)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    first = max((row["step"] for row in rows), default=0) / 30
    for split, style, size in (("train", ".-", 1), ("validation", "o-", 4), ("test", "*", 12)):
        points = [row for row in rows if row["split"] == split and row["step"] > first]
        if steps := [row["step"] for row in points]:
            losses = [row["loss"] for row in points]
            label = f"{split}, last {losses[-1]:.3f}"
            axes.plot(steps, losses, style, markersize=size, color=_COLORS[split], label=label)
    if axes.lines:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write_file(directory / CURVES, picture.getvalue())
