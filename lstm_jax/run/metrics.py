"""Write and read the losses of a run: metrics.jsonl and TensorBoard events."""

import contextlib
import json
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict, Unpack

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import hparams, scalar, text
from tqdm import tqdm

from lstm_jax.config import Config, flatten
from lstm_jax.data import files
from lstm_jax.data.standard_texts import SPLITS
from lstm_jax.errors import UserError, name_failure

_LARGEST = 2**26  # Limit in bytes of the part of metrics.jsonl that is read.


class Extra(TypedDict, total=False):
    """The optional fields of a row: numbers, which are shown by name, and a sample."""

    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    bits_per_character: float
    sample: str  # The generated text of a validation, for TensorBoard and `watch` only.


class Row(Extra):
    """A row of metrics.jsonl: a loss in nats per token after `step` training steps."""

    step: int
    epoch: float  # The number of passes over the training text, with fractions.
    split: str
    loss: float
    seconds: float  # Of training so far.
    time: str  # In UTC.


# Called with each row, with the sample of a validation.
Watch = Callable[[Row], object]


class MetricsWriter(contextlib.ExitStack[None]):
    """Appends losses to metrics.jsonl, and losses and samples to TensorBoard events.

    The files are opened for the first row, so that a run without one leaves them as they are.
    """

    def __init__(
        self, path: Path, step: int, config: Config, watch: Watch = lambda row: None
    ) -> None:
        """Prepare metrics.jsonl at `path`, and events beside it, for a run that is at `step`.

        TensorBoard shows the fields of the config as hyperparameters. The seconds of training
        continue from the last row.
        """
        super().__init__()
        self._path, self._step, self._config, self._watch = path, step, config, watch
        rows = read_metrics(path)
        self._start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        self._is_open = False

    def _open(self) -> None:
        self._is_open = True
        self._lines = self.enter_context(self._path.open("ab"))
        # A killed process or a full disk can leave half a line.
        if half := files.read_tail(self._path, 2**16).rpartition(b"\n")[2]:
            self._lines.truncate(self._path.stat().st_size - len(half))
        # tensorboardX's SummaryWriter has a thread, which loses its queue when the process is
        # killed and waits forever when the disk is full.
        suffix = f".{time.time_ns()}"  # TensorBoard reads files in the order of their names.
        self._events = EventsWriter(str(self._path.parent / "events"), filename_suffix=suffix)
        self.callback(self._events.close)
        # TensorBoard then hides later steps of earlier events, like `purge_step` of SummaryWriter.
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=self._step + 1, session_log=start))
        losses = [f"{split}/loss" for split in SPLITS]
        for summary in hparams(list_hyperparameters(self._config), losses)[:2]:
            self._add(Event(summary=summary))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def write(
        self, step: int, epoch: float, split: str, loss: float, **extra: Unpack[Extra]
    ) -> None:
        """Record a loss in nats per token, and call `watch` with its row.

        The row comes last: a run that resumes records a test loss only if its row is missing.

        `step` is the number of training steps done, `epoch` of passes over the training text,
        with fractions, and `split` is "train", "validation" or "test". The row also has the seconds
        of training so far, and the time in UTC.
        """
        if not self._is_open:
            self._open()
        sample = extra.pop("sample", None)
        row: Row = {
            "step": step,
            "epoch": round(epoch, 6),
            "split": split,
            "loss": loss,
            **extra,
            "seconds": round(time.monotonic() - self._start, 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        line = f"{json.dumps(row)}\n"
        numbers = {k: v for k, v in row.items() if k not in ("step", "epoch", "split", "time")}
        values = [scalar(f"{split}/{name}", x).value[0] for name, x in numbers.items()]
        self._add(Event(step=step, summary=Summary(value=values)))
        if sample is not None:  # As Markdown, with every line indented, it is shown as it is.
            quoted = textwrap.indent(sample, "    ", lambda line: True)
            self._add(Event(step=step, summary=text(f"{split}/sample", quoted)))
            row["sample"] = sample
        try:
            # What it prints is not behind the bar. Without tqdm's lock: it may wait for a thread.
            with tqdm.external_write_mode(sys.stderr, nolock=True):
                self._watch(row)
        except BaseException as error:
            error.is_of_watch = True  # type: ignore[attr-defined]  # For `session`.
            raise
        self._lines.write(line.encode())
        self._lines.flush()


def list_hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """Return the fields of a config by name, with values of other types as strings."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flatten(config)
    }


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl; [] if the file does not exist.

    An incomplete last line, which is still being written, and all but the last 64 MiB of the file
    are left out.

    Raises:
      UserError: if the file can't be read, or a line is not JSON.
    """
    with name_failure(f"can't read {path}"):
        content = files.read_tail(path, _LARGEST)
    if len(content) == _LARGEST:  # The first line may be incomplete.
        content = content[content.find(b"\n") + 1 :]
    try:
        return [json.loads(line) for line in content.split(b"\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{path} is damaged, remove the line that is not JSON: {error}") from None
