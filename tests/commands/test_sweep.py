"""Test sweeps: spaces, trials that are interrupted, storages, reports, and workers that die."""

import contextlib
import functools
import json
import random
import re
import runpy
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import pytest
from ml_collections import ConfigDict
from optuna.trial import TrialState

import commands
import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError
from lstm_jax.run import ensemble, metrics, workdir
from lstm_jax.run.interrupts import Stopped, StopRequest
from lstm_jax.sweep import report, search, space, study

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

ROOT = Path(__file__).parents[2]
# The number of workers to kill.
KILLS = draws.TIMES
# Enough trials for one to run at every kill: the other worker finishes two or three of them while a
# killed worker restarts.
TRIALS = 2 + 3 * KILLS

# A worker that detects dead ones sooner.
WORKER = """
import runpy
from lstm_jax.sweep import study
study.BEAT_SECONDS, study.STALE_SECONDS = 1, 15
runpy.run_module("lstm_jax.sweep", run_name="__main__", alter_sys=True)
"""


def start(flags: list[str]) -> subprocess.Popen[str]:
    """Start a worker."""
    command, pipe = [sys.executable, "-c", WORKER, *flags], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def run(flags: list[str]) -> str:
    """Run a worker in this process, and return what it prints."""
    done = commands.run("sweep", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]


def wait_for_work(directory: Path, worker: subprocess.Popen[str]) -> None:
    """Wait until a worker trains a trial: it then holds the lock of a working directory."""

    def holds(path: Path) -> bool:
        with contextlib.suppress(OSError):
            return path.read_text().startswith(f"process {worker.pid} on ")
        return False

    commands.wait_until(lambda: any(map(holds, directory.glob("trials/*/.lock"))), worker)


@pytest.mark.process
@pytest.mark.drawn
def test_trials_of_killed_workers_are_resumed(
    text_file: Path, space_file: Path, tmp_path: Path
) -> None:
    directory, more = tmp_path / "sweep", (f"--space={space_file}", f"--trials={TRIALS}")
    flags = runs.make_sweep_flags(text_file, directory, *more)
    workers = [start(flags) for _ in range(2)]
    commands.wait_until((directory / "trials.jsonl").exists, workers[0], 300)
    chance = random.Random(draws.SEED)
    before: dict[int, dict] = {}
    for _ in range(KILLS):
        place = chance.randrange(2)
        wait_for_work(directory, workers[place])
        time.sleep(chance.uniform(0, 2))
        before |= {r["trial"]: r for r in rows(directory) if r["state"] in ("complete", "pruned")}
        workers[place].kill()
        workers[place].communicate()
        workers[place] = start(flags)
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    time.sleep(15)  # Until the last dead worker is detected.
    _, errors = (last := start(flags)).communicate(timeout=300)
    assert last.returncode == 0, errors
    found = {row["trial"]: row for row in rows(directory)}
    assert len(found) in (TRIALS, TRIALS + 1), "both workers may start the last one"
    assert {row["state"] for row in found.values()} <= {"complete", "pruned"}
    for number, row in before.items():
        assert found[number] == row, "a finished trial changed"
    for row in found.values():
        measured = metrics.read_metrics(Path(row["workdir"]) / workdir.METRICS)
        steps = [(r["step"], r["split"]) for r in measured]
        assert len(set(steps)) == len(steps), "a resumed trial repeated a step"


@pytest.mark.slow
def test_one_worker_is_reproducible_and_best_py_is_the_best_config(
    swept: Path, text_file: Path, space_file: Path, tmp_path: Path
) -> None:
    flags = runs.make_sweep_flags(text_file, tmp_path, f"--space={space_file}", "--trials=2")
    done = commands.run("sweep", *flags)
    assert done.returncode == 0 and "Best of 2 trials" in done.stdout
    ended = r"trial 0 complete at (\S+): .*; 1 of 2 trials, best \1 \(trial 0\)\n"
    assert re.match(ended, done.stderr), done.stderr
    results = [
        [(r["overrides"], r["losses_by_epoch"], r["state"]) for r in rows(directory)]
        for directory in (swept, tmp_path)
    ]
    assert results[0] == results[1]
    best = min(rows(tmp_path), key=lambda row: row["validation_loss"])
    assert best["validation_loss"] == min(best["losses_by_epoch"].values())
    settings = config_lib.complete_config(runpy.run_path(str(tmp_path / "best.py"))["get_config"]())
    trained = workdir.load_config(Path(best["workdir"]))
    assert settings == config_lib.change_fields(trained, {"data.sha256": ""})

    # The same command has nothing left to do; another experiment raises an error.
    done = commands.run("sweep", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    other = commands.run("sweep", *flags, "--config.num_epochs=3")
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "made for another experiment (config.num_epochs was 1 and is 3)" in other.stderr


@pytest.mark.slow
def test_a_signal_between_trials_writes_the_results_and_the_same_command_resumes(
    text_file: Path, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = runs.make_sweep_flags(text_file, tmp_path, f"--space={space_file}", "--trials=2")
    write = report.write_trials

    def stop(*given: Any) -> None:
        monkeypatch.undo()
        write(*given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report, "write_trials", stop)  # After the first trial.
    stopped = commands.run("sweep", *flags)
    assert stopped.returncode == 130, stopped.stderr
    assert "Best of " in stopped.stdout and "Traceback" not in stopped.stderr
    before = [row for row in rows(tmp_path) if row["state"] == "complete"]
    assert len(before) == 1 and (tmp_path / report.BEST).exists()
    run(flags)
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["complete"] * 2 and found[:1] == before


@pytest.mark.slow
def test_seeds_are_compared_and_not_searched(text_file: Path, tmp_path: Path) -> None:
    output = run(runs.make_sweep_flags(text_file, tmp_path, "--seeds=3"))
    assert sorted(row["overrides"]["seed"] for row in rows(tmp_path)) == [0, 1, 2]
    for split in ("validation", "test"):
        losses = [row[f"{split}_loss"] for row in rows(tmp_path)]
        spread = f"{np.mean(losses):.4f}, standard deviation {np.std(losses, ddof=1):.4f}"
        assert f"{split} loss of 3 seeds: mean {spread}, from " in output
    assert not (tmp_path / report.BEST).exists() and "best.py" not in output
    line = next(line for line in output.splitlines() if line.startswith("Measure their ensemble: "))
    assert "python -m lstm_jax.evaluate --workdir " in line
    loaded, steps = ensemble.load_ensemble(shlex.split(line.partition("evaluate")[2])[1::2])
    assert len(loaded.model.members) == len(steps) == 3


def test_a_sweep_has_a_space_or_seeds() -> None:
    for flags in ([], ["--seeds=2", "--space=space.py"]):
        done = commands.run("sweep", f"--config={ROOT}/experiments/quick.py", *flags)
        assert done.returncode == 2 and "use either --space" in done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "FileNotFoundError"),
        ("x = 1", "KeyError: 'get_overrides'"),
        ("def f(:", "line 1: invalid syntax"),
        ("def get_overrides(trial):\n    return 1 / 0", "line 2: ZeroDivisionError"),
        (
            "def get_overrides(trial):\n    return {'optimizer.learning_rat': 1e-3}",
            "space.py: there is no field optimizer.learning_rat: did you mean",
        ),
        ("def get_overrides(trial):\n    return {'seed': 'a'}", "must be of type int"),
        (
            "def get_overrides(t):\n    return {'num_epochs': t.suggest_int('n', -3, 1)}",
            "config.num_epochs is",
        ),
        (
            "def get_overrides(t):\n    return {'data.min_count': t.suggest_int('n', 2, 3)}",
            "space.py: it changes data.min_count, but losses on different texts or tokens can't be",
        ),
    ],
)
def test_a_broken_space_gives_a_one_line_error(
    code: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(UserError, match=message) as caught:
        space.load_space(str(path)).check(config_lib.Config())
    assert len(str(caught.value).splitlines()) == 1


def test_a_grid_needs_choices_and_visits_each_once(tmp_path: Path) -> None:
    path, experiment = tmp_path / "space.py", config_lib.Config()
    path.write_text(runs.SPACE)
    loaded = space.load_space(str(path))
    with pytest.raises(UserError, match="use suggest_categorical for every parameter"):
        search.prepare_sweep(experiment, "grid", loaded, trials=None, grid=True)
    path.write_text(
        "def get_overrides(t):\n"
        "    return {'seed': t.suggest_categorical('s', [0, 2, 4]),\n"
        "            'optimizer.name': t.suggest_categorical('o', ['adam', 'sgd'])}"
    )
    loaded = space.load_space(str(path))
    grid = loaded.check(experiment)
    assert grid == {"s": [0, 2, 4], "o": ["adam", "sgd"]}
    record = optuna.create_study(sampler=study.make_sampler(0, grid, 0))
    drawn = [loaded.draw_config(record.ask(), experiment)[0] for _ in range(6)]
    assert len({tuple(overrides.values()) for overrides in drawn}) == 6


def test_a_sampler_depends_only_on_the_seed() -> None:
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        record = optuna.create_study(sampler=study.make_sampler(seed, {}, 0))
        points = []
        for _ in range(14):
            if number:  # The trials of other workers come in between.
                record.sampler = study.make_sampler(seed, {}, 99)
            trial = record.ask()
            record.sampler = study.make_sampler(seed, {}, trial.number)
            points.append((trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)))
            record.tell(trial, sum(points[-1]))
        drawn.append(points)
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 14


def make_sweep(
    directory: Path,
    experiment: Any,
    trials: int,
    location: str | None = None,
    draw: Any = lambda trial: {"optimizer.learning_rate": trial.suggest_float("x", 1e-3, 1e-2)},
    pruner: Any = None,
) -> search.Sweep:
    pruner = pruner or optuna.pruners.NopPruner()
    return search.Sweep(
        study.open_study(directory, location, "tiny", {}, pruner),
        functools.partial(study.make_sampler, 0, {}),
        *(experiment, space.Space("tiny.py", draw), directory, trials),
    )


@pytest.fixture
def trained_in(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace training by an entry into the list that this returns."""
    directories: list[Path] = []

    def train(config: Any, directory: Path, watch: Any) -> int:
        directories.append(directory)
        return 0

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(search, "read_losses", lambda directory: (1.0, 1.5))
    return directories


def list_states(sweep: search.Sweep) -> list[TrialState]:
    return [trial.state for trial in sweep.study.trials]


@pytest.mark.parametrize("location", [None, "study.journal"])
def test_workers_share_a_study_and_draw_what_one_draws(
    location: str | None, tiny_config: ConfigDict, tmp_path: Path, trained_in: list[Path]
) -> None:
    drawn = []
    for workers in (1, 4):
        directory = tmp_path / str(workers)
        directory.mkdir()
        place = location and str(directory / location)
        for trials in range(4 // workers, 5, 4 // workers):
            sweep = make_sweep(directory, tiny_config, trials, place)
            search.run_worker(sweep, StopRequest())
        drawn.append([trial.params["x"] for trial in sweep.study.trials])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4
    assert (tmp_path / "1" / (location or study.DATABASE)).exists()


@pytest.mark.parametrize("location", ["no://thing", "sqlite:////nowhere/at/all.db"])
def test_a_study_that_cannot_be_opened_gives_a_one_line_error(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="the study can't be read or written") as caught:
        study.use_optuna()(make_sweep)(tmp_path, None, 1, location)
    assert len(str(caught.value).splitlines()) == 1


def test_a_trial_of_a_dead_worker_resumes_its_directory_until_too_many_have_died(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_in: list[Path]
) -> None:
    monkeypatch.setattr(study.retry, "_max_retry", 2)
    survive = training.train

    def die(config: Any, directory: Path, watch: Any) -> int:
        watch({"split": "validation", "step": 1, "epoch": 1, "loss": 3.0})
        trained_in.append(directory)
        raise GeneratorExit  # Nothing handles it, as nothing is left of a process that is killed.

    def run_worker() -> dict[str, Any]:
        with contextlib.closing(sqlite3.connect(tmp_path / study.DATABASE)) as database:
            database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
            database.commit()
        with contextlib.suppress(GeneratorExit):
            search.run_worker(sweep, StopRequest())
        report.write_trials(sweep.study, tmp_path)
        (row,) = rows(tmp_path)
        return row

    sweep = make_sweep(tmp_path, tiny_config, 1)
    monkeypatch.setattr(training, "train", die)
    before = [run_worker() for _ in range(2)]
    assert before[0]["state"] == "running" and before[0]["losses_by_epoch"] == {"1": 3.0}
    monkeypatch.setattr(training, "train", survive)
    row = run_worker()
    assert trained_in == [tmp_path / "trials" / "0000"] * 3
    assert (row["trial"], row["state"], row["validation_loss"]) == (0, "complete", 1.0)
    assert row["overrides"] == before[0]["overrides"] and row["losses_by_epoch"] == {"1": 3.0}

    sweep = sweep._replace(trials=2)
    monkeypatch.setattr(training, "train", die)
    for _ in range(4):
        with contextlib.suppress(ValueError):  # There are two rows.
            run_worker()
    assert [row["state"] for row in rows(tmp_path)] == ["complete", "failed"]
    assert trained_in[3:] == [tmp_path / "trials" / "0003"] * 3


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), UnavailableError("full"), Stopped(143)]
)
def test_an_interrupted_trial_is_queued_again(
    error: Any, tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path, tiny_config, 1)
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=[error]))
    with pytest.raises(type(error)):
        search.run_worker(sweep, StopRequest())
    assert list_states(sweep) == [TrialState.FAIL, TrialState.WAITING]
    report.write_trials(sweep.study, tmp_path)
    assert [(row["trial"], row["state"]) for row in rows(tmp_path)] == [(0, "waiting")]


@pytest.mark.parametrize(
    "error", [NotFiniteError("it is not finite"), UserError("it is too short"), MemoryError()]
)
def test_a_trial_that_cannot_be_trained_fails_with_its_reason(
    error: Exception, tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=error))
    search.run_worker(make_sweep(tmp_path, tiny_config, 2), StopRequest())
    for row in rows(tmp_path):
        assert row["state"] == "failed" and (str(error) or "MemoryError") in row["reason"]


def test_a_signal_waits_until_all_parameters_are_drawn(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    """A resumed trial would draw the rest from the beginning of its random numbers."""
    signals = StopRequest()

    def draw(trial: Any) -> dict[str, Any]:
        trial.suggest_float("x", 0, 1)
        signals.handle_signal(signal.SIGTERM, None)
        return {"optimizer.learning_rate": trial.suggest_float("y", 1e-3, 1e-2)}

    sweep = make_sweep(tmp_path, tiny_config, 1, draw=draw)
    with pytest.raises(Stopped, match="143"):
        search.run_worker(sweep, signals)
    _, queued = sweep.study.trials
    assert queued.state == TrialState.WAITING and [*queued.params] == ["x", "y"]


def test_a_mistake_in_a_space_fails_one_trial(tiny_config: ConfigDict, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, tiny_config, 2, draw=lambda trial: {"num_epochs": -1})
    with pytest.raises(UserError, match="tiny.py: config.num_epochs is -1"):
        search.run_worker(sweep, StopRequest())
    assert list_states(sweep) == [TrialState.FAIL]


@pytest.mark.parametrize(("max_steps", "state"), [(0, "PRUNED"), (10, "COMPLETE")])
def test_a_bad_trial_is_pruned_after_an_epoch_unless_it_is_trained(
    max_steps: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, directory: Path, watch: Any) -> int:
        for epoch in (0, 0.5, 1):
            row = {"split": "validation", "step": int(10 * epoch), "epoch": epoch, "loss": 3.0}
            watch(row)
        return 0

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(search, "read_losses", lambda directory: (3.0, 3.0))
    experiment = config_lib.complete_config({"num_epochs": 2, "max_steps": max_steps})
    pruner = optuna.pruners.ThresholdPruner(upper=2.0)
    search.run_worker(sweep := make_sweep(tmp_path, experiment, 1, pruner=pruner), StopRequest())
    (trial,) = sweep.study.trials
    assert (trial.state, trial.value) == (TrialState[state], 3.0)
    assert trial.intermediate_values == {1: 3.0}
