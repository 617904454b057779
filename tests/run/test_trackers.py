"""Test what --track passes on; trackers that are not installed are skipped."""

import dataclasses
import html
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from conftest import make_tiny_config
from lstm_jax import training
from lstm_jax.errors import UserError
from lstm_jax.run import trackers, workdir


def test_a_missing_package_raises_an_error_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r"needs .*: pip install 'lstm-jax\[track-wandb\]'"),
        trackers.open_wandb(tmp_path),
    ):
        pytest.fail("it was opened")


@pytest.mark.slow
def test_a_tracker_that_cannot_be_opened_ends_the_run_with_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path) -> Any:
        raise RuntimeError("there is\nno key")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: json.__spec__)
    monkeypatch.setattr(trackers, "_start", refuse)
    config = dataclasses.replace(workdir.load_config(trained), max_steps=10)
    with (
        pytest.raises(UserError, match=r"--track wandb failed \(RuntimeError: there is no key\)"),
        trackers.open_wandb(tmp_path / "run") as watch,
    ):
        training.train(config, tmp_path / "run", watch)
    training.train(config, tmp_path / "run")


def train_tracked(text_file: Path, directory: Path) -> tuple[list, list]:
    """Train with a tracker, and resume; return the losses, and those before it resumed."""
    config = make_tiny_config(text_file)
    before: list = []
    for config.max_steps in (20, 40):
        with trackers.open_wandb(directory) as watch:
            training.train(config, directory, watch)
        before = before or runs.read_losses(directory)
    return runs.read_losses(directory), before


def read_wandb(path: Path) -> Iterator[Any]:
    """Yield the records of a file of W&B: a log in LevelDB's format after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 < len(content):
        if at % 2**15 > 2**15 - 7:  # The rest of a block.
            at += -at % 2**15
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            yield Record.FromString(record)
            record = b""


@pytest.mark.process
def test_wandb_gets_metrics_config_and_samples(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra 'track-wandb')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = tmp_path / "run"
    losses, before = train_tracked(text_file, directory)
    logged, fields, identities = [], {}, set()
    paths = directory.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        for record in read_wandb(path):
            for item in record.config.update:
                fields[item.key or item.nested_key[0]] = json.loads(item.value_json)
            if record.HasField("run"):
                identities.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                logged += [
                    (values["step"], split, values[f"{split}/loss"])
                    for split in ("train", "validation", "test")
                    if f"{split}/loss" in values
                ]
    assert logged[: len(before)] == before and set(losses) <= set(logged)
    assert fields["model.hidden_size"] == 24 and fields["max_steps"] == 40
    assert len(identities) == 1
    pages = directory.glob("wandb/offline-run-*/files/media/**/*.html")
    shown = [html.unescape(page.read_text()) for page in pages]
    assert len(shown) == 4  # That of step 20 again when the run resumed.
    sample = (directory / workdir.SAMPLES).read_text().split("\n")[1]
    assert sample.strip() and any(sample.strip() in text for text in shown)
