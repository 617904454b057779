"""What a run measured: metrics.jsonl, TensorBoard events, and the curves as a picture."""

import functools
import io
import json
import math
import secrets
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from lstm_jax.errors import UserError
from lstm_jax.run import files

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = {"train": "#0072B2", "validation": "#D55E00", "test": "#009E73"}
# Bytes that are read of a metrics.jsonl, and those of a row, at the most.
_LARGEST, _LONGEST_LINE = 2**26, 2**12


class MetricsWriter:
    """Appends to metrics.jsonl and to the TensorBoard events of a working directory."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens both for a run that goes on after `step`.

        Args:
          path: of metrics.jsonl; the events are written beside it.
          step: TensorBoard hides events of later steps, which an interrupted run left behind.
        """
        self._lines = files.open_append(path)
        # A process that was killed, or a disk that was full, can leave half a line.
        tail = files.read_tail(path, _LONGEST_LINE)
        half = len(tail) - (tail.rfind(b"\n") + 1)
        if half:
            self._lines.truncate(path.stat().st_size - half)
        # tensorboardX's usual writer has a thread of its own, which loses what it holds when the
        # process is killed and waits for ever when the disk is full.
        self._events = EventsWriter(
            str(path.parent / "events"),
            # A name that no other file has, and that nobody can have made a link of.
            filename_suffix=f".{secrets.token_hex(8)}",
        )
        if step:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=step + 1, session_log=start))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def write(self, step: int, epoch: float, split: str, loss: float, **extra: float) -> None:
        """Records a loss.

        Args:
          step: training steps done.
          epoch: passes over the training text done, with fractions.
          split: "train", "validation" or "test".
          loss: in nats per token.
          **extra: other figures, such as tokens_per_second.
        """
        row = make_row(step, epoch, split, loss, **extra)
        self._lines.write(f"{json.dumps({**row, 'crc': _checksum(row)})}\n".encode())
        self._lines.flush()
        for name, value in {"loss": loss, **extra}.items():
            self._add(Event(step=step, summary=scalar(f"{split}/{name}", value)))

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


def make_row(step: int, epoch: float, split: str, loss: float, **extra: float) -> dict[str, Any]:
    """Return a row of metrics.jsonl without its checksum; see `MetricsWriter.write`."""
    return {"step": step, "epoch": round(epoch, 6), "split": split, "loss": loss, **extra}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without checksums; none where there is no such file.

    Damaged lines are left out and counted in a warning. A last line that is still being written,
    and all but the last 64 MiB of a file, are left out too.

    Raises:
      UserError: if it can't be read.
    """
    try:
        content = files.read_tail(path, _LARGEST)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if len(content) == _LARGEST:  # It may begin within a line.
        content = content[content.find(b"\n") + 1 :]
    rows, damaged = [], 0
    for line in content.splitlines(keepends=True):
        if row := _parse(line):
            rows.append(row)
        else:
            damaged += line.endswith(b"\n")
    if damaged:
        _warn(path, damaged)
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line, None if it is damaged; rows of old runs have no checksum."""
    try:
        row: dict[str, Any] = json.loads(line) if len(line) <= _LONGEST_LINE else {}
        valid = (
            isinstance(row["step"], int)
            and 0 <= row["step"] < 2**31
            and isinstance(row["loss"], float)
            and row["split"] in _COLOURS
        )
        crc = row.pop("crc", None)
        return row if valid and crc in (None, _checksum(row)) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _checksum(row: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


@functools.cache  # Once a process: training reads its metrics after each epoch.
def _warn(path: Path, damaged: int) -> None:
    lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
    print(f"warning: left out {lines} of {path}", file=sys.stderr)


def plot_metrics(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes `draw_metrics`'s picture as a PNG file, whole or not at all."""
    picture = io.BytesIO()
    FigureCanvasAgg(draw_metrics(rows)).print_png(picture)
    files.write_file(path, picture.getvalue())


def draw_metrics(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws the losses of all splits over steps."""
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
    later = [row for row in rows if row["step"] and math.isfinite(row["loss"])]
    if ordered := sorted(row["loss"] for row in later):
        measured = [row["loss"] for row in later if row["split"] != "train"]
        top = max([ordered[int(0.97 * (len(ordered) - 1))], *measured])
        if top > ordered[0]:
            axes.set_ylim(top=top + 0.05 * (top - ordered[0]))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
