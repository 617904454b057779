"""Test what --track passes on; trackers that are not installed are skipped."""

import dataclasses
import html
import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import commands
import runs
from conftest import make_tiny_config
from lstm_jax import training
from lstm_jax.errors import UserError
from lstm_jax.run import metrics, trackers, workdir

ROOT = Path(__file__).parents[1]
OWN = """
import json
rows = []
def write(row):
    rows.append(row)
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
def fail(row):
    raise ValueError("the server\\nis down")
number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a module of a user's functions; return its name."""
    (tmp_path / "own_tracker.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "own_tracker"
    sys.modules.pop("own_tracker", None)


def make_row(step: int, split: str, **more: Any) -> Any:
    return {"step": step, "epoch": step / 70, "split": split, "loss": 2.0, "time": "now", **more}


def test_a_function_gets_each_row_and_one_that_fails_is_left_out(
    own: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, closed = shutil.copytree(trained, tmp_path / "run"), list[bool]()
    # "json" is the name of a package.
    monkeypatch.setitem(trackers._TRACKERS, "json", lambda run: (float, closed.append))
    rows = [make_row(0, "validation", sample="O"), make_row(10, "train"), make_row(20, "train")]
    with trackers.open_trackers([f"{own}:fail", f"{own}:write", "json"], directory) as watch:
        for row in rows:
            watch(row)
            assert closed == [True], "it is told that it failed"
    assert sys.modules[own].rows == rows and closed == [True]
    assert sys.modules[own].rows[0] is not rows[0], "each tracker may change its own"
    failed, other = capsys.readouterr().err.splitlines()
    assert failed == (
        "warning: --track=own_tracker:fail failed and gets no more rows "
        "(ValueError: the server is down)"
    )
    assert "--track=json failed and gets no more rows (TypeError" in other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "--track is 'nothing': it must be wandb, or"),
        ("os.path:", "--track is 'os.path:'"),
        ("own_tracker:number", "--track=own_tracker:number is not a function"),
        ("own_tracker:none", "can't be imported: AttributeError: .* has no attribute 'none'"),
        ("no.module:f", "can't be imported: ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_a_wrong_name_raises_an_error(name: str, message: str, own: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message), trackers.open_trackers([name], tmp_path):
        pytest.fail("it was opened")


def test_a_missing_package_raises_an_error_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r"needs .* wandb: pip install 'lstm-jax\[track-wandb\]'"),
        trackers.open_trackers(["wandb"], tmp_path),
    ):
        pytest.fail("it was opened")


@pytest.mark.slow
def test_a_tracker_that_cannot_be_opened_ends_the_run_with_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("there is\nno key")

    monkeypatch.setitem(trackers._TRACKERS, "json", refuse)  # The name of a package.
    config = dataclasses.replace(workdir.load_config(trained), max_steps=10)
    with (
        pytest.raises(UserError, match=r"--track=json failed \(RuntimeError: there is no key\)"),
        trackers.open_trackers(["json"], tmp_path / "run") as watch,
    ):
        training.train(config, tmp_path / "run", watch)
    assert training.train(config, tmp_path / "run") == 0, "it resumes"


@pytest.mark.process
def test_the_flag_passes_rows_to_a_function(own: str, text_file: Path, tmp_path: Path) -> None:
    result = commands.run_python(
        # -P: like the script `lstm-jax`, it does not find modules in the current directory.
        *("-P", "-m", "lstm_jax.main", f"--config={ROOT}/experiments/quick.py"),
        *(f"--config.data.path={text_file}", *runs.TINY),
        *("--config.sample.length=20", "--config.max_steps=20", "--workdir=run"),
        *(f"--track={own}:write", "--track", f"{own}:fail"),
        cwd=tmp_path,
    )
    assert result.returncode == 0 and result.stderr.count("\n") == 1, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    samples = [row.pop("sample") for row in rows if "sample" in row]
    assert rows == metrics.read_metrics(tmp_path / "run" / workdir.METRICS)
    assert len(samples) == 2


def train_tracked(name: str, text_file: Path, directory: Path) -> tuple[list, list]:
    """Train with a tracker, and resume; return the losses, and those before it resumed."""
    config = make_tiny_config(text_file)
    before: list = []
    for config.max_steps in (20, 40):
        with trackers.open_trackers([name], directory) as watch:
            assert training.train(config, directory, watch) == 0
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
    losses, before = train_tracked("wandb", text_file, directory)
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
