"""Test the rows of metrics.jsonl, the events of TensorBoard, and the plot."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runs
from lstm_jax.errors import UserError
from lstm_jax.run import metrics, workdir


def test_a_row_is_written_after_tensorboard_and_watch_have_it(tmp_path: Path) -> None:
    def watch(row: workdir.Row) -> None:
        assert all(written["split"] == "train" for written in workdir.read_metrics(tmp_path))
        assert ("test/loss" in {tag for _, tag, _ in runs.read_events(tmp_path)}) == (
            row["split"] == "test"
        )
        row["step"] = -1  # This row is the caller's own.
        if row["split"] == "test":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), metrics.MetricsWriter(tmp_path, 0, watch) as writer:
        writer.write(10, 0.5, "train", 2.5)
        writer.write(10, 0.5, "test", 2.5)
    rows = workdir.read_metrics(tmp_path)
    assert [(row["split"], row["step"]) for row in rows] == [("train", 10)]


def drop_times(rows: list[workdir.Row]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in rows]


def test_tensorboard_has_the_samples(trained: Path) -> None:
    values = {
        (value.tag, event.step): value
        for event in runs.iterate_events(trained)
        for value in event.summary.value
    }
    for step in (0, 70, 140):
        (content,) = values["validation/sample/text_summary", step].tensor.string_val
        lines = [line.removeprefix("    ") for line in content.decode().split("\n")]
        assert "\n".join(lines) in (trained / "samples.txt").read_text()


def test_rows_are_appended_and_an_incomplete_or_damaged_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert workdir.read_metrics(tmp_path) == []
    row: Any = {"step": 10, "epoch": 0.5, "split": "train", "loss": 2.5, "tokens_per_second": 100}
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(**row)
    with path.open("ab") as file:
        file.write(b'{"step": 20, "lo')
    assert drop_times(workdir.read_metrics(tmp_path)) == [row]
    with metrics.MetricsWriter(tmp_path, 10) as writer:
        writer.write(20, 1, "validation", 2.25)
    rows = drop_times(workdir.read_metrics(tmp_path))
    assert rows == [row, {"step": 20, "epoch": 1, "split": "validation", "loss": 2.25}]
    content = path.read_bytes()
    for line in (b"\xff\xfe{\n", b"[" * 10**5 + b"\n"):
        path.write_bytes(content + line)
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            workdir.read_metrics(tmp_path)
    path.write_text(json.dumps({**row, "seconds": 100.0}) + "\n")
    with metrics.MetricsWriter(tmp_path, 20) as writer:
        writer.write(30, 1, "train", 2.0)
    assert 100 <= workdir.read_metrics(tmp_path)[-1]["seconds"] < 200


def test_the_plot_contains_the_curves(tmp_path: Path) -> None:
    rows: list[Any] = [{"step": s, "split": "train", "loss": 4 / (1 + s)} for s in range(1, 50)]
    rows += [{"step": s, "split": "validation", "loss": 4 / s} for s in (10, 20, 40)]
    rows += [{"step": 40, "split": "test", "loss": 0.2}]
    for some in (rows[-1:], [], rows):  # It does not fail if there is nothing to draw.
        lines = [f"{json.dumps(row)}\n" for row in some]
        (tmp_path / workdir.METRICS).write_text("".join(lines))
        metrics.plot_metrics(tmp_path)
    with Image.open(tmp_path / workdir.CURVES) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}
    for hexadecimal in ("0072B2", "D55E00", "009E73"):
        assert tuple(bytes.fromhex(hexadecimal)) in colors
    assert {path.name for path in tmp_path.iterdir()} == {workdir.METRICS, workdir.CURVES}


def test_tensorboard_shows_no_later_step_of_a_killed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(2 * 10**18, -1)  # It is set back.
    monkeypatch.setattr(time, "time_ns", clock.__next__)
    path = tmp_path / "metrics.jsonl"
    for step, losses in ((0, (4.0, 3.0, 2.0)), (10, (2.5,))):
        with metrics.MetricsWriter(tmp_path, step) as writer:
            for number, loss in enumerate(losses, 1):
                writer.write(step + 10 * number, 1.0, "train", loss)
        path.unlink()
    assert runs.read_events(tmp_path) == [(10, "train/loss", 4.0), (20, "train/loss", 2.5)]
