"""Test sweeps: spaces, trials that are interrupted, storages, results, and workers that die."""

import contextlib
import functools
import random
import shlex
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
from optuna.trial import FrozenTrial, TrialState

import commands
import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError
from lstm_jax.run.interrupts import Stopped
from lstm_jax.sweep import search

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    # A resumed trial measures its last epoch again.
    pytest.mark.filterwarnings("ignore:The reported value is ignored"),
]

ROOT = Path(__file__).parents[2]
SPACE = """
def get_overrides(trial):
    return {
        "optimizer.learning_rate": trial.suggest_float("rate", 1e-3, 1e-1, log=True),
        "optimizer.schedule": trial.suggest_categorical("schedule", ["cosine", "linear"]),
    }
"""
# A worker that detects dead ones sooner.
WORKER = """
import runpy
from lstm_jax.sweep import search
search.BEAT_SECONDS, search.STALE_SECONDS = 1, 30
runpy.run_module("lstm_jax.sweep", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def flags(text_file: Path, tmp_path: Path) -> list[str]:
    """Return the flags of a sweep that trains tiny models for 70 steps."""
    (tmp_path / "space.py").write_text(SPACE)
    return [
        *("--config", f"{ROOT}/experiments/quick.py", f"--config.data.path={text_file}"),
        *(f"--workdir={tmp_path}/sweep", *runs.TINY, "--config.num_epochs=1"),
        "--config.sample.length=40",
    ]


def load_trials(directory: Path) -> list[FrozenTrial]:
    """Return the last attempt at each trial of a sweep in the default storage."""
    location = f"sqlite:///{directory}/study.db"
    return search.list_trials(optuna.load_study(study_name=None, storage=location))


@pytest.mark.process
@pytest.mark.drawn
def test_trials_of_killed_workers_are_resumed(flags: list[str], tmp_path: Path) -> None:
    # Enough trials for one to run at every kill: the other worker finishes two or three of them
    # while a killed worker restarts.
    number = 2 + 3 * draws.TIMES
    directory, flags = tmp_path / "sweep", [*flags, f"--space={tmp_path}/space.py"]

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, *flags, f"--trials={number}"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)

    def finish(worker: subprocess.Popen[str]) -> int:
        output, errors = worker.communicate(timeout=300)
        assert worker.returncode == int("Unfinished trials" in output), errors
        return worker.returncode

    def is_training(worker: subprocess.Popen[str]) -> bool:
        """Return whether a worker holds the lock of a working directory."""
        with contextlib.suppress(OSError):
            locks = [path.read_text() for path in directory.glob("trials/*/.lock")]
            return any(text.startswith(f"process {worker.pid} on ") for text in locks)
        return False

    directory.mkdir()
    search.open_study(directory.name, f"sqlite:///{directory}/study.db")
    workers, chance = [start() for _ in range(2)], random.Random(draws.SEED)
    for _ in range(draws.TIMES):
        place = chance.randrange(2)
        commands.wait_until(lambda: is_training(workers[place]), workers[place], 300)  # noqa: B023
        time.sleep(chance.uniform(0, 2))
        workers[place].kill()
        workers[place].communicate()
        workers[place] = start()
    for worker in workers:
        finish(worker)
    while finish(start()):  # Until the last dead worker is detected.
        time.sleep(1)
    found = load_trials(directory)
    assert len(found) in (number, number + 1), "both workers may start the last one"
    assert {trial.state for trial in found} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for path in directory.glob("trials/*"):
        steps = [row[:2] for row in runs.read_losses(path)]
        assert len(set(steps)) == len(steps), "a resumed trial repeated a step"


@pytest.mark.slow
def test_the_command_prints_all_trials_and_how_to_train_the_best(
    flags: list[str], tmp_path: Path
) -> None:
    flags += [f"--space={tmp_path}/space.py", "--trials=2", "--config.seed=3"]
    result = commands.run("sweep", *flags)
    assert result.returncode == 0, result.stderr
    _, _, *rows, _, best = result.stdout.splitlines()
    trials = load_trials(tmp_path / "sweep")
    assert rows == [search.make_row(trial) for trial in trials]
    assert sorted(result.stderr.splitlines()) == sorted(rows)
    losses = runs.read_losses(tmp_path / f"sweep/trials/{trials[0].number:04}")
    test_loss = trials[0].user_attrs["test_loss"]
    assert trials[0].value == min(loss for _, split, loss in losses if split == "validation")
    assert losses[-1][1:] == ("test", test_loss)

    command = shlex.split(best.removeprefix("Train the best one: "))
    assert command[1:3] == ["-m", "lstm_jax.main"]
    commands.get_output("main", *command[3:], f"--workdir={tmp_path}/best")
    assert runs.read_losses(tmp_path / "best")[-1][2] == test_loss
    again = commands.run("sweep", *flags)  # It has nothing left to do.
    assert (again.returncode, again.stderr, again.stdout) == (0, "", result.stdout)


@pytest.mark.slow
def test_seeds_are_compared_and_not_searched(flags: list[str], tmp_path: Path) -> None:
    output = commands.get_output("sweep", *flags, "--seeds=2")
    trials = load_trials(tmp_path / "sweep")
    assert sorted(trial.params["seed"] for trial in trials) == [0, 1]
    losses = np.array([(trial.value, trial.user_attrs["test_loss"]) for trial in trials])
    numbers = zip(losses.mean(0), losses.std(0, ddof=1), strict=True)
    validation, test = (f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in numbers)
    assert output.endswith(f"\nMean of 2 seeds: validation {validation}, test {test}\n")


GIVE = "def get_overrides(trial):\n    return "
BROKEN = {
    "space file .*space.py: KeyError: 'get_overrides'": "x = 1",
    "line 2: ZeroDivisionError": f"{GIVE}1 / 0",
    "no field optimizer.learning_rat: did you mean": f"{GIVE}{{'optimizer.learning_rat': 1e-3}}",
    "there is no field 1": f"{GIVE}{{1: 2}}",
    "ValueError: FloatDistribution.step must": f"{GIVE}{{'seed': trial.suggest_float('s', 0, 1)}}",
    "a grid has at most 10 points": f"{GIVE}{{'seed': trial.suggest_int('s', 0, 10)}}",
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_space_gives_a_one_line_error(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_POINTS", 10)
    path = tmp_path / "space.py"
    path.write_text(BROKEN[message])
    with pytest.raises(UserError, match=message) as error:
        search.list_points(search.load_space(str(path)), config_lib.Config())
    assert len(str(error.value).splitlines()) == 1


def test_a_grid_visits_each_point_once(
    tmp_path: Path, tiny_config: ConfigDict, trained_in: list[Path]
) -> None:
    (tmp_path / "space.py").write_text(
        "import numpy as np, optuna\n"
        "def get_overrides(trial):\n"
        "    if trial.suggest_categorical('o', ['adam', 'sgd']) == 'adam':\n"
        "        return {'optimizer.name': 'adam'}\n"
        "    k = trial.suggest_int('k', 3, 6)\n"
        "    if k == 3:\n"
        "        raise optuna.TrialPruned\n"
        "    return {'optimizer.name': 'sgd', 'model.hidden_size': np.int64(2) ** k}\n"
    )
    space = search.load_space(str(tmp_path / "space.py"))
    experiment, directory = config_lib.complete_config(tiny_config), tmp_path / "a%20b?"
    for trials in (2, None):
        sweep = search.open_sweep(experiment, space, directory, grid=True, trials=trials)
        search.run_worker(sweep)
        # Two workers can start the last trial at the same time.
        sweep.study.optimize(functools.partial(search._run_trial, sweep), 1)
    surplus = search.list_trials(sweep.study).pop()
    assert (surplus.state, surplus.params) == (TrialState.PRUNED, {})
    overrides = [trial.user_attrs["overrides"] for trial in search.list_trials(sweep.study)[:4]]
    assert sorted(fields.get("model.hidden_size", 0) for fields in overrides) == [0, 16, 32, 64]
    assert len(trained_in) == 4
    assert {path.name for path in directory.iterdir()} == {"study.db", "trials"}

    tiny_config.num_epochs = 99
    for fields, grid, changed in ((experiment, False, "grid"), (tiny_config, True, "num_epochs")):
        with pytest.raises(UserError, match=f"holds a sweep with another {changed}"):
            other = config_lib.complete_config(fields)
            search.open_sweep(other, space, directory, grid=grid)


def draw_rate(trial: Any) -> dict[str, Any]:
    return {"optimizer.learning_rate": trial.suggest_float("x", 1e-3, 1e-2)}


def make_sweep(
    directory: Path, experiment: Any, trials: int, space: Any = draw_rate, **options: Any
) -> search.Sweep:
    experiment = config_lib.complete_config(experiment)
    return search.open_sweep(experiment, space, directory, trials=trials, **options)


@pytest.fixture
def trained_in(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace training by an entry into the list that this returns."""
    directories: list[Path] = []

    def train(config: Any, directory: Path, watch: Any) -> int:
        directories.append(directory)
        return 0

    monkeypatch.setattr(training, "train", train)
    set_losses(monkeypatch, validation=1.0, test=1.5)
    return directories


def set_losses(monkeypatch: pytest.MonkeyPatch, **losses: float) -> None:
    """Let each run have these losses by split."""
    monkeypatch.setattr(training, "read_losses", lambda directory, split: {0: losses[split]})


@pytest.mark.parametrize("location", [None, "study.journal"])
def test_workers_share_a_study(
    location: str | None, tiny_config: ConfigDict, tmp_path: Path, trained_in: list[Path]
) -> None:
    place = location and str(tmp_path / location)
    for trials in range(1, 5):
        sweep = make_sweep(tmp_path, tiny_config, trials, location=place)
        search.run_worker(sweep)
    assert len({trial.params["x"] for trial in sweep.study.trials}) == len(trained_in) == 4
    assert (tmp_path / (location or "study.db")).exists()


def test_a_study_that_cannot_be_opened_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="the study can't be opened") as caught:
        search.open_study("name", "sqlite:////nowhere/at/all.db")
    assert len(str(caught.value).splitlines()) == 1


def test_a_trial_of_a_dead_worker_resumes_its_directory(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_in: list[Path]
) -> None:
    survive = training.train

    def die(config: Any, directory: Path, watch: Any) -> int:
        watch({"split": "validation", "step": 1, "epoch": 1, "loss": 3.0})
        trained_in.append(directory)
        raise GeneratorExit  # Nothing handles it, as nothing is left of a process that is killed.

    def run_worker(train: Any) -> list[FrozenTrial]:
        monkeypatch.setattr(training, "train", train)
        with contextlib.suppress(GeneratorExit):
            search.run_worker(sweep)
        return search.list_trials(sweep.study)

    sweep = make_sweep(tmp_path, tiny_config, 1)
    storage: Any = sweep.study._storage
    storage = storage._backend
    storage.grace_period = -1  # As if an hour had passed.
    run_worker(die)
    (dead,) = run_worker(die)
    assert dead.state == TrialState.RUNNING and dead.intermediate_values == {1: 3.0}
    (trial,) = run_worker(survive)
    assert trained_in == [tmp_path / "trials" / "0000"] * 3
    assert (search.get_number(trial), trial.value, trial.params) == (0, 1.0, dead.params)
    assert trial.intermediate_values == {1: 3.0}

    sweep = sweep._replace(trials=2)
    storage.grace_period = search.STALE_SECONDS
    run_worker(die)
    # No time has passed, so it seems to be alive.
    assert [trial.state for trial in run_worker(survive)][1:] == [TrialState.RUNNING]
    assert search.run_worker(sweep) == 1
    assert "of other workers: 1. If these have ended" in search.describe_results(sweep.study, "")


@pytest.mark.parametrize(
    ("error", "grid"),
    [
        (OSError(5, "Input/output error"), False),
        (UnavailableError("full"), False),
        (Stopped(143), False),
        (UserError("a typo, which may be in each point"), True),
    ],
)
def test_an_interrupted_trial_is_queued_again(
    error: Any, grid: bool, tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path, tiny_config, 1, search.make_seed_space(0, 1), grid=grid)
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=error))
    for _ in range(12):
        with pytest.raises(type(error)):
            search.run_worker(sweep)
    states = [trial.state for trial in sweep.study.trials]
    assert states == [TrialState.FAIL] * 12 + [TrialState.WAITING]
    assert [search.get_number(trial) for trial in search.list_trials(sweep.study)] == [0]


def test_a_trial_that_diverges_is_pruned_and_a_mistake_ends_the_sweep(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [NotFiniteError("it is not finite"), MemoryError(), UserError("it is too short")]
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=errors))
    sweep = make_sweep(tmp_path, tiny_config, 4)
    with pytest.raises(UserError, match="it is too short"):
        search.run_worker(sweep)
    states = [trial.state for trial in sweep.study.trials]
    assert states == [TrialState.PRUNED] * 2 + [TrialState.FAIL]
    rows = search.describe_results(sweep.study, "").splitlines()[2:]
    assert "NotFiniteError: it is not finite" in rows[0] and "MemoryError" in rows[1]


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
    set_losses(monkeypatch, validation=3.0, test=3.0)
    sweep = make_sweep(tmp_path, {"num_epochs": 2, "max_steps": max_steps}, 1)
    sweep.study.pruner = optuna.pruners.ThresholdPruner(upper=2.0)
    search.run_worker(sweep)
    (trial,) = sweep.study.trials
    assert (trial.state, trial.value) == (TrialState[state], 3.0)
    assert trial.intermediate_values == {1: 3.0}
