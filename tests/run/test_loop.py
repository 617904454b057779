"""Test the parts of the training loop: when it acts, what it logs, how it stops."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from lstm_jax import config as config_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax import training
from lstm_jax.batches import Batch, make_batches
from lstm_jax.devices import mesh
from lstm_jax.run import checkpoints, messages, workdir


def list_steps(directory: Path, split: str = "validation") -> list[int]:
    return [step for step, name, _ in runs.read_losses(directory) if name == split]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that is set by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_the_speed_is_that_of_the_steps_after_the_first(clock: SimpleNamespace) -> None:
    progress = messages.Progress(140, 6400, print)
    computed = SimpleNamespace(block_until_ready=lambda: setattr(clock, "now", clock.now + 3))
    slow: Any = computed  # It is computed three seconds after its call has returned.
    clock.now += 50  # It compiles.
    progress.after_step(11, slow)
    assert clock.now == 153 and progress.report(11, 0.2, 2.5) == 0
    clock.now += 2
    progress.after_step(15, slow)
    assert progress.report(15, 0.2, 2.5) == 2 * 6400
    progress.stop_clock()  # After a validation.
    clock.now += 7
    progress.after_step(16, slow)
    assert clock.now == 165
    clock.now += 1
    assert progress.report(19, 0.3, 2.5) == 3 * 6400


def test_progress_is_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = messages.Progress(140, 6400, print)
    clock.now += 30
    progress.report(1, 1 / 70, 2.5)
    clock.now += 5
    progress.report(6, 6 / 70, 2.4)  # Too early for a line.
    clock.now += 15
    progress.report(21, 0.3, 2.25)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/140, epoch 0.01, loss 2.500",  # The speed was not measured yet.
        "step 21/140, epoch 0.30, loss 2.250, 6,400 tokens/s, 0:01:59 left",
    ]


def test_a_line_says_what_to_change_once_if_the_validation_loss_rises() -> None:
    rows: list[Any] = []
    lines = []
    for epoch, loss in enumerate([2.0, 1.9, 1.91, 1.95, 1.8, 1.9, 1.85, 1.9]):
        rows.append({"step": epoch, "epoch": epoch, "split": "validation", "loss": loss})
        lines.append(messages.describe_validation(rows, 7.0, ""))
    (hint,) = [line for line in lines if "rises" in line]
    assert lines.index(hint) == 6 and "num_epochs=4 (docs/choosing.md)" in hint


def test_a_save_is_due_when_the_last_one_is_old(clock: SimpleNamespace, tmp_path: Path) -> None:
    writer = checkpoints.CheckpointWriter(tmp_path, 60.0)
    clock.now += 59
    assert not writer.is_due()
    clock.now += 1
    assert writer.is_due()


def test_at_most_16_steps_are_ahead_of_the_devices(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, batches = list[int](), list[Batch]()
    wait, feed = jax.block_until_ready, mesh.feed_batches

    def note_wait(array: jax.Array) -> jax.Array:
        waits.append(len(batches))
        return wait(array)

    def note_batches(*args: Any) -> Iterator[Batch]:
        for batch in feed(*args):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(mesh, "feed_batches", note_batches)
    tiny_config.max_steps, tiny_config.log_every_steps = 45, 40
    monkeypatch.setattr(jax, "block_until_ready", note_wait)
    training.train(tiny_config, tmp_path)
    assert {*waits} - {0} == {1, 16, 32, 40, 45}, "the first one starts the clock"


def test_an_implicit_transfer_to_the_device_raises_an_error(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = config_lib.complete_config(tiny_config)
    on_host = make_batches(np.zeros(20_000, np.uint8), complete.batches, 0)
    monkeypatch.setattr(mesh, "feed_batches", lambda *args: on_host)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        training.train(tiny_config, tmp_path)


@pytest.mark.slow
def test_validating_more_often_does_not_change_training(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.validate_every_steps, tiny_config.log_every_steps = 35, 5
    with pytest.raises(runs.KilledError):
        training.train(tiny_config, tmp_path, runs.kill_at(105, "validation"))
    training.train(tiny_config, tmp_path)
    assert list_steps(tmp_path) == [0, 35, 70, 105, 140]
    numbers = runs.read_numbers(tmp_path)
    assert len(set(numbers)) == len(numbers), "each step once"
    means = "train/loss", "train/gradient_norm"  # Since the last row.
    assert {row for row in runs.read_numbers(trained) if row[1] not in means} <= set(numbers)
    for name in means:
        every_5, every_10 = (
            [number for _, key, number in rows if key == name]
            for rows in (numbers, runs.read_numbers(trained))
        )
        np.testing.assert_allclose(np.reshape(every_5, (-1, 2)).mean(axis=1), every_10, rtol=1e-5)
    samples = (tmp_path / workdir.SAMPLES).read_text()
    assert samples.count("=== step ") == 5 and "=== step 35," in samples


@pytest.mark.slow
def test_max_steps_ends_the_run_and_its_schedule(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.max_steps = 103
    training.train(tiny_config, tmp_path)
    assert "=== epoch 1.471 of 1.471: validation loss" in capsys.readouterr().out
    assert workdir.list_steps(tmp_path / workdir.CHECKPOINTS) == [70, 103]
    rows = workdir.read_metrics(tmp_path)
    (rate,) = [row["learning_rate"] for row in rows if (row["step"], row["split"]) == (60, "train")]
    schedule = optimizer_lib.make_schedule(tiny_config.optimizer, 103)
    assert rate == pytest.approx(float(schedule(59)), rel=1e-5)
    training.train(tiny_config, tmp_path)
    output = capsys.readouterr().out
    assert "is finished, at step 103: to train longer" in output
    # A validation is part of its checkpoint, also where a longer run has none.
    tiny_config.max_steps, recorded = 0, list[workdir.Row]()
    training.train(tiny_config, tmp_path, recorded.append)
    assert [row["step"] for row in recorded if row["split"] == "validation"] == [140]
    assert list_steps(tmp_path) == [0, 70, 103, 140]
    samples = (tmp_path / workdir.SAMPLES).read_text()
    assert [int(x) for x in re.findall("=== step ([0-9]+),", samples)] == [0, 70, 103, 140]


@pytest.fixture
def patient_config(tiny_config: ConfigDict) -> ConfigDict:
    """Return a config whose validation losses soon stop falling."""
    tiny_config.optimizer.update(learning_rate=0.2, schedule="constant")
    tiny_config.update(validate_every_steps=15, num_epochs=20, patience=3)
    return tiny_config


@pytest.mark.slow
def test_patience_ends_a_run_at_the_same_step_whether_or_not_it_was_killed(
    patient_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    training.train(patient_config, whole)
    output = capsys.readouterr().out
    losses = {s: loss for s, split, loss in runs.read_losses(whole) if split == "validation"}
    *_, before, last = steps = list(losses)
    best = min(losses, key=losses.__getitem__)
    assert last < 1400 and steps.index(last) - steps.index(best) == 3
    assert (
        f"Training ends at step {last} of 1400: the validation loss has not improved for 3 "
        "validations\n"
    ) in output
    assert f"Test loss at step {best}, the step with the best validation loss" in output
    assert list_steps(whole, "test") == [best]
    assert output.count(f"; best {losses[best]:.4f} at step {best}; training loss ") == 4

    # Before a validation, and during the last one, whose loss is lost.
    for step, split in ((before // 10 * 10, "train"), (last, "validation")):
        with pytest.raises(runs.KilledError):
            training.train(patient_config, killed, runs.kill_at(step, split))
    training.train(patient_config, killed)
    runs.assert_same(whole, killed)

    # It is finished, and more patience resumes it.
    content = (whole / workdir.METRICS).read_bytes()
    training.train(patient_config, whole)
    assert "is finished, at step" in capsys.readouterr().out
    assert (whole / workdir.METRICS).read_bytes() == content
    patient_config.patience, patient_config.max_steps = 0, last + 5
    training.train(patient_config, whole)
    assert list_steps(whole)[: len(steps)] == steps and list_steps(whole)[-1] == last + 5
