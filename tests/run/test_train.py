"""Test training: resumed bit for bit, refused for other settings, and its files."""

import copy
import itertools
import math
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import commands
import lstm_jax
import runs
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import training
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, messages, workdir
from lstm_jax.run.interrupts import Stopped
from lstm_jax.train_step import TrainState, TrainStep


def replace_train_step(
    monkeypatch: pytest.MonkeyPatch, take: Callable[[int, TrainStep, TrainState, Any], TrainState]
) -> None:
    """Let `take` take training steps; it gets their number, counted over all runs of the test."""
    numbers, make = itertools.count(1), training.make_train_step

    def make_replaced(*args: Any) -> TrainStep:
        step = make(*args)
        return lambda state, batch: take(next(numbers), step, state, batch)

    monkeypatch.setattr(training, "make_train_step", make_replaced)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stop_after", "number"),  # In the first epoch, and at the end of it.
    [("windows", 70, signal.SIGINT), ("streams", 37, signal.SIGTERM)],
)
def test_a_stopped_run_resumes_bit_for_bit(
    kind: str,
    stop_after: int,
    number: signal.Signals,
    tiny_config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tiny_config.batches.kind = kind
    if kind == "streams":  # With all regularization.
        for name in tiny_config.regularization:
            tiny_config.regularization[name] = 0.1
    tiny_config.log_every_steps = 1
    monkeypatch.setattr(messages, "_SECONDS_BETWEEN_LINES", 0)
    training.train(tiny_config, whole)

    def stop(steps: int, step: TrainStep, state: TrainState, batch: Any) -> TrainState:
        if steps == stop_after:  # Ctrl-C also ends a `tee` that reads the output.
            monkeypatch.setattr(sys.stdout, "write", mock.Mock(side_effect=BrokenPipeError))
            signal.raise_signal(number)
        return step(state, batch)

    replace_train_step(monkeypatch, stop)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as error:
        training.train(tiny_config, stopped)
    assert error.value.code == 128 + number
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    training.train(tiny_config, stopped)
    runs.assert_same(whole, stopped)


def test_a_signal_in_the_last_validation_stops_before_the_test(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.max_steps = 5

    def stop(row: Mapping[str, Any]) -> None:
        if (row["split"], row["step"]) == ("validation", 5):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        training.train(tiny_config, tmp_path, stop)
    assert not any(split == "test" for _, split, _ in runs.read_losses(tmp_path))
    training.train(tiny_config, tmp_path)
    assert any(split == "test" for _, split, _ in runs.read_losses(tmp_path))


def test_a_run_writes_all_its_files(trained: Path) -> None:
    names = {path.name for path in trained.iterdir() if "tfevents" not in path.name}
    files = ".lock config.json curves.png metrics.jsonl samples.txt vocabulary.json"
    assert names == {"checkpoints", *files.split()}
    assert len(list(trained.glob("events.out.tfevents.*"))) >= 1
    rows = workdir.read_metrics(trained)
    assert [row["epoch"] for row in rows if row["split"] == "validation"] == [0, 1, 2]
    train_rows = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train_rows] == list(range(10, train_rows[-1]["step"] + 1, 10))
    assert all(row["tokens_per_second"] > 0 for row in train_rows)
    assert all(0 < row["gradient_norm"] < 10 for row in train_rows)
    # The warm-up ends at the eleventh step, and the cosine ends at zero.
    rates = [row["learning_rate"] for row in train_rows]
    assert rates[0] == 0.018 and rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 1e-5
    for row in rows:
        if row["split"] != "train":
            assert row["bits_per_character"] == pytest.approx(row["loss"] / math.log(2))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0 and all("time" in row for row in rows)
    assert train_rows[-1]["loss"] < train_rows[0]["loss"] - 0.5, "it learns"
    assert (trained / workdir.SAMPLES).read_text().count("=== step ") == 3


def test_the_test_loss_is_that_of_the_best_checkpoint(trained: Path) -> None:
    rows = workdir.read_metrics(trained)
    validation = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    (test,) = [row for row in rows if row["split"] == "test"]
    assert test["step"] == min(validation, key=lambda step: validation[step])
    loaded = lstm_jax.load(trained)
    text = Path(loaded.config.data.path).read_text(encoding="utf-8")
    ids = loaded.vocabulary.encode(text[19_000:])
    assert loss_lib.compute_loss(loaded.model, loaded.params, ids) == pytest.approx(test["loss"])


def test_an_untrained_model_predicts_the_frequencies_of_the_training_text(
    trained: Path, run: lstm_jax.Run, text_file: Path
) -> None:
    losses = [loss for _, split, loss in runs.read_losses(trained) if split == "validation"]
    ids, size = run.vocabulary.encode(text_file.read_text(encoding="utf-8")), len(run.vocabulary)
    counts = np.bincount(ids[:18_000], minlength=size) + 1
    unigram = -np.log(counts / counts.sum())[ids[18_001:19_000]].mean()
    assert losses[0] == pytest.approx(unigram, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_is_moved_stops_the_run_at_the_next_save(
    replaced: bool, trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    directory, moved = tmp_path / "run", tmp_path / "moved"

    def move(row: Mapping[str, Any]) -> None:
        if row["step"] == 80:
            directory.rename(moved)
            if replaced:
                (directory / workdir.CHECKPOINTS).mkdir(parents=True)

    with pytest.raises(UserError, match=f"{directory}.* is gone: the working directory was moved"):
        training.train(tiny_config, directory, move)
    assert not any((directory / workdir.CHECKPOINTS).glob("*"))
    training.train(tiny_config, moved)
    runs.assert_same(trained, moved)


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is_if_more_steps_fail(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(trained, tmp_path / "run")
    before = (directory / workdir.METRICS).read_bytes()
    longer = copy.deepcopy(tiny_config)
    longer.num_epochs, longer.distill.teachers = tiny_config.num_epochs + 1, "missing"
    with pytest.raises(UserError, match="no trained model in 'missing'"):
        training.train(longer, directory)
    assert (directory / workdir.METRICS).read_bytes() == before
    longer.distill.teachers = ""
    with pytest.raises(runs.KilledError):
        training.train(longer, directory, runs.kill_at(150, "train"))
    training.train(tiny_config, directory)
    runs.assert_same(trained, directory)
    capsys.readouterr()
    (directory / workdir.CURVES).unlink()  # As if it had been killed before the last one.
    tiny_config.optimizer.weight_decay = 0.5
    finished = training.train(tiny_config, directory)
    assert (directory / workdir.CURVES).exists()
    output = capsys.readouterr().out
    assert "is finished, at step 140: to train longer, raise --config.num_epochs" in output
    assert "weight_decay" not in output, "it keeps the config that it was trained with"
    assert finished.config == workdir.load_config(directory) == workdir.load_config(trained)


def test_another_model_or_text_in_the_same_directory_raises_an_error(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    directory = shutil.copytree(trained, tmp_path / "run")
    tiny_config.model.hidden_size = 25
    with pytest.raises(UserError, match="model.hidden_size was 24 and is 25"):
        training.train(tiny_config, directory)
    tiny_config.model.hidden_size = 24
    other = tmp_path / "other.txt"
    other.write_text(Path(tiny_config.data.path).read_text() + ".")
    tiny_config.data.path = str(other)
    message = "data.path was .*data.sha256 was .*begin anew: use another --workdir, or remove"
    with pytest.raises(UserError, match=message):
        training.train(tiny_config, directory)


def test_a_validation_text_too_short_is_refused_before_training(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    for name, text in (("validation", "a"), ("test", "ab")):
        (tmp_path / name).write_text(text)
    tiny_config.data.path = f"{tiny_config.data.path};{tmp_path}/validation;{tmp_path}/test"
    with pytest.raises(UserError, match="validation split is too short: it has 1 .*, and needs 2"):
        training.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / workdir.METRICS).exists()


def test_hidden_dropout_of_one_layer_gives_a_warning(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.model.num_layers, tiny_config.regularization.hidden_dropout = 1, 0.5
    tiny_config.max_steps = 1
    training.train(tiny_config, tmp_path)
    assert "hidden_dropout is between layers" in capsys.readouterr().err


def test_training_does_not_use_the_mesh_of_the_caller(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.max_steps = 1
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        training.train(tiny_config, tmp_path / "run", quiet=True)


def poison(monkeypatch: pytest.MonkeyPatch, *poisoned: int) -> None:
    """Make the carry of these steps infinite, counted over all runs of the test."""

    def poison_step(steps: int, step: TrainStep, state: TrainState, batch: Any) -> TrainState:
        if steps not in poisoned:
            return step(state, batch)
        with jax.transfer_guard("allow"):
            bad = jax.tree.map(lambda x: x * jnp.inf, state.carry)
        return step(state._replace(carry=bad), batch)._replace(carry=state.carry)

    replace_train_step(monkeypatch, poison_step)


@pytest.mark.slow
def test_a_run_that_is_not_finite_stops_and_resumes(
    tiny_config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, 93)
    with pytest.raises(UserError, match="finite at step 100: resume .* that of step 70, with a"):
        training.train(tiny_config, tmp_path)
    assert "140 steps are few: for a short text, --config exp" in capsys.readouterr().out
    # Nothing of this logging interval is saved or logged.
    steps = [step for step, split, _ in runs.read_losses(tmp_path) if split == "train"]
    assert steps == list(range(10, 100, 10))
    assert all(np.isfinite(loss) for *_, loss in runs.read_losses(tmp_path))
    assert workdir.list_steps(tmp_path / workdir.CHECKPOINTS) == [0, 70]
    tiny_config.optimizer.learning_rate = 0.01
    training.train(tiny_config, tmp_path)
    output = capsys.readouterr().out
    assert "optimizer.learning_rate is now 0.01; it was 0.02\n" in output
    assert "steps are few" not in output
    assert all(np.isfinite(x).all() for x in runs.load_final_state(tmp_path))


def test_fewer_epochs_than_a_run_has_had_raise_an_error(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    directory = shutil.copytree(trained, tmp_path / "run")
    before = (directory / workdir.CONFIG).read_bytes()
    # As if it had stopped before the last validation.
    (directory / workdir.CHECKPOINTS / "140" / checkpoints.VALIDATION).unlink()
    tiny_config.num_epochs = 1
    with pytest.raises(UserError, match="trained 140 steps already: raise --config.num_epochs"):
        training.train(tiny_config, directory)
    assert (directory / workdir.CONFIG).read_bytes() == before


@pytest.mark.slow
def test_a_new_run_starts_from_the_weights_of_another(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(tiny_config.data.path).read_text(encoding="utf-8")
    new = tmp_path / "new.txt"
    new.write_text(text.replace("q", "é").replace("x", "ß")[::-1], encoding="utf-8")
    tiny_config.data.path = str(new)
    tiny_config.init_from = str(trained)
    tiny_config.max_steps = 1
    training.train(tiny_config, tmp_path / "run")
    source = lstm_jax.load(trained)
    output = capsys.readouterr().out
    assert f"those of step {source.step} in {trained}" in output
    assert "2 new tokens: 'ß', 'é'" in output
    vocabulary = workdir.load_vocabulary(tmp_path / "run")
    assert vocabulary.tokens == (*source.vocabulary.tokens, "ß", "é")

    # The checkpoint of step 0 has the old weights, and fresh rows for the new tokens.
    fresh = model_lib.init_params(
        model_lib.make_model(tiny_config.model, len(vocabulary)),
        jax.random.split(jax.random.key(tiny_config.seed))[0],
    )
    shutil.copytree(tmp_path / "run" / workdir.CHECKPOINTS / "0", tmp_path / "alone" / "0")
    start, _ = checkpoints.restore_best_params(tmp_path / "alone", fresh)
    n, expected = len(source.vocabulary), source.params
    rows = [expected["embedding"]["embedding"], fresh["embedding"]["embedding"][n:]]
    expected["embedding"]["embedding"] = np.concatenate(rows)
    columns = [expected["dense"]["kernel"], fresh["dense"]["kernel"][:, n:]]
    expected["dense"]["kernel"] = np.concatenate(columns, axis=1)
    for params in (start, expected):
        del params["dense"]["bias"]  # That of new tokens has their frequency.
    jax.tree.map(np.testing.assert_array_equal, start, expected)

    # The run resumes with or without `init_from`; another value raises an error.
    tiny_config.init_from = ""
    training.train(tiny_config, tmp_path / "run")
    assert workdir.load_config(tmp_path / "run").init_from == str(trained)
    tiny_config.init_from = str(tmp_path)
    with pytest.raises(UserError, match="init_from was"):
        training.train(tiny_config, tmp_path / "run")


def test_weights_of_a_model_of_other_sizes_raise_an_error(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.init_from = str(trained)
    tiny_config.model.hidden_size = 25
    tiny_config.batches.batch_size = 4  # The batch size may differ.
    with pytest.raises(UserError, match="hidden_size is 25, but 24 in .*: set the same$"):
        training.train(tiny_config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (workdir.CONFIG, "no complete run: restore config.json"),
        (workdir.VOCABULARY, "vocabulary.json is missing or damaged"),
        (workdir.CHECKPOINTS, "no complete run: restore checkpoints"),
    ],
)
def test_a_run_with_missing_files_does_not_start_over(
    name: str, message: str, trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    (directory / name).rename(tmp_path / name)
    before = sorted(directory.rglob("*"))
    with pytest.raises(UserError, match=message):
        training.train(tiny_config, directory)
    assert sorted(directory.rglob("*")) == before
    (tmp_path / name).rename(directory / name)
    training.train(tiny_config, directory)


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    script = """
import ctypes, resource, sys
from concurrent.futures import ThreadPoolExecutor
from lstm_jax.devices.setup import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use(*sizes):
    blocks = [(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size))), size) for size in sizes]
    for memory, size in blocks:
        ctypes.memset(memory, 1, size)
    for memory, _ in blocks:
        libc.free(memory)
thread = ThreadPoolExecutor(1)
for call in (use, 72 << 20), (thread.submit, use, 40 << 20, 40 << 20):  # In a heap, and in two.
    for i in range(11):
        if i == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if future := call[0](*call[1:]):
            future.result()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def count(argument: str) -> list[int]:
        return [int(n) for n in commands.run_python("-c", script, argument).stdout.split()]

    # 40 MiB are 10,240 pages of 4 KiB, or 20 of 2 MiB.
    assert max(count("keep")) < 20 < min(count("leave"))
