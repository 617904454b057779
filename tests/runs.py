"""Make, read and compare the working directories of tiny runs."""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog

import commands
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.run import checkpoints, metrics, workdir
from lstm_jax.train_step import init_state

ROOT = Path(__file__).parents[1]
# Flags of a tiny model.
TINY = (
    *("--config.batches.batch_size=8", "--config.batches.window_length=32"),
    *("--config.model.embedding_size=8", "--config.model.hidden_size=24"),
)
# Fields of a row of metrics that differ when a run is repeated.
TIMES = ("tokens_per_second", "seconds", "time")


def make_arguments(text_file: Path, directory: Path, *more: str) -> list[str]:
    """Return flags of `main`: train for 4 epochs of 70 steps, and save often."""
    return [
        *("--config", f"{ROOT}/experiments/quick.py"),
        *(f"--workdir={directory}", f"--config.data.path={text_file}"),
        *(*TINY, "--config.model.dtype=float32"),
        *("--config.num_epochs=4", "--config.sample.length=40"),
        *("--config.checkpoint_every_seconds=0.2", *more),
    ]


def load_final_state(directory: Path) -> list[Any]:
    """Return all arrays of the latest checkpoint."""
    config = workdir.load_config(directory)
    vocabulary = workdir.load_vocabulary(directory)
    model = model_lib.make_model(config.model, len(vocabulary))
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 1)
    state = init_state(model, optimizer, config)
    saved = directory / workdir.CHECKPOINTS
    _, items, *_ = checkpoints.restore_latest(saved, state.params, state.rest)
    items.state["key"] = jax.random.key_data(items.state["key"])
    return [np.asarray(x) for x in jax.tree.leaves((items.params, items.state))]


class KilledError(Exception):
    """Ends a run without a checkpoint, as SIGKILL does."""


def kill_at(step: int, split: str) -> metrics.Watch:
    """Return a callback for `training.train` that ends the run after this row."""

    def watch(row: workdir.Row) -> None:
        if (row["step"], row["split"]) == (step, split):
            raise KilledError

    return watch


def read_losses(directory: Path) -> list[tuple[int, str, float]]:
    """Return the losses of metrics.jsonl."""
    rows = workdir.read_metrics(directory)
    return [(row["step"], row["split"], row["loss"]) for row in rows]


def read_numbers(directory: Path) -> list[tuple[int, str, float]]:
    """Return all numbers of metrics.jsonl that don't depend on the time, as in `read_events`."""
    others = ("step", "epoch", "split", *TIMES)
    rows = workdir.read_metrics(directory)
    return [
        (row["step"], f"{row['split']}/{name}", value)
        for row in rows
        for name, value in row.items()
        if name not in others and isinstance(value, int | float)
    ]


def iterate_events(directory: Path) -> Iterator[Event]:
    """Yield the events in the TensorBoard files; the last of a killed process may be incomplete."""
    for path in sorted(directory.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at + 12 < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            at += length + 16
            if at <= len(content):
                yield Event.FromString(content[at - length - 4 : at - 4])


def read_events(directory: Path) -> list[tuple[int, str, float]]:
    """Return the same numbers from the TensorBoard files, sorted, as TensorBoard shows them.

    The start of a process hides later steps of earlier ones. A point that was written twice is one.
    """
    rows: set[tuple[int, str, float]] = set()
    for event in iterate_events(directory):
        if event.session_log.status == SessionLog.START:
            rows = {row for row in rows if row[0] < event.step}
        for value in event.summary.value:
            name, kind = value.tag.partition("/")[2], value.WhichOneof("value")
            if kind == "simple_value" and name not in TIMES:
                rows.add((event.step, value.tag, value.simple_value))
    return sorted(rows)


def _assert_same_rows(
    one: list[tuple[int, str, float]], other: list[tuple[int, str, float]], rtol: float
) -> None:
    assert [row[:2] for row in one] == [row[:2] for row in other]
    ours, theirs = ([number for *_, number in rows] for rows in (one, other))
    np.testing.assert_allclose(ours, theirs, rtol=rtol, equal_nan=False)


def assert_same(one: Path, other: Path, rtol: float = 0) -> None:
    """Assert that two runs have the same parameters, state, metrics, events and samples.

    All are compared bit for bit, except for logged numbers, which may differ by `rtol`: in another
    program, XLA may sum them in another order.
    """
    for a, b in zip(load_final_state(one), load_final_state(other), strict=True):
        np.testing.assert_array_equal(a, b)
    _assert_same_rows(read_numbers(one), read_numbers(other), rtol)
    assert (one / workdir.SAMPLES).read_text() == (other / workdir.SAMPLES).read_text()
    _assert_same_rows(read_events(one), read_events(other), rtol)
    np.testing.assert_allclose(
        [number for *_, number in read_events(one)],
        [number for *_, number in sorted(read_numbers(one))],
        rtol=1e-6,  # TensorBoard stores float32.
    )
    assert len(set(read_losses(one))) == len(read_losses(one)), "each step once"


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a training process with these flags."""
    command = [sys.executable, "-m", "lstm_jax.main", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def wait_for_rows(process: subprocess.Popen[str], directory: Path, number: int) -> None:
    """Wait until the run has written `number` lines of metrics."""
    commands.wait_until(lambda: len(workdir.read_metrics(directory)) >= number, process, 300)
