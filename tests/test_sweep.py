"""Run sweeps with real workers that are killed at random, on a file and on a server."""

import contextlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import pytest
import sqlalchemy
from ml_collections import ConfigDict
from optuna.trial import TrialState

import commands
import disks
import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError
from lstm_jax.run import ensemble, lock, metrics, workdir
from lstm_jax.run.signals import Stopped, StopRequest
from lstm_jax.sweep import report, search, space, storage, study

ROOT = Path(__file__).parents[1]
# The number of workers to kill for each kind of study, and the seed of the moments.
KILLS = draws.TIMES
# Enough trials for one to run at every kill: the other worker finishes two or three of them while a
# killed worker restarts.
TRIALS = 2 + 3 * KILLS


# A worker that detects dead ones sooner.
WORKER = """
import runpy
from lstm_jax.sweep import storage
storage.BEAT_SECONDS, storage.STALE_SECONDS = 1, 20
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Start a PostgreSQL server on the loopback address and return its URL."""
    found = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    binaries = next((Path(path).parent for path in found if path), None)
    if binaries is None:
        pytest.skip("there is no PostgreSQL server here")
    pytest.importorskip("psycopg")
    data = tmp_path / "postgresql"
    user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL does not run as root.
        data.mkdir()
        shutil.chown(data, "nobody")
        for parent in (tmp_path, *[*tmp_path.parents][:3]):
            parent.chmod(parent.stat().st_mode | 0o711)
        user = ["setpriv", "--reuid=nobody", "--clear-groups", "--inh-caps=-all"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run_there(program: str, *arguments: str) -> None:
        command = [*user, str(binaries / program), f"--pgdata={data}", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    run_there("initdb", "--username=me", "--auth=trust")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {data}"
    run_there("pg_ctl", "start", "--wait", f"--log={data}/log", f"--options={options}")
    yield f"postgresql://me@127.0.0.1:{port}/postgres"
    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGINT)


def wait_for_work(directory: Path, worker: subprocess.Popen[str]) -> None:
    """Wait until a worker trains a trial: it then holds the lock of a working directory."""

    def holds(path: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads(path.read_text())["pid"] == worker.pid)
        return False

    commands.wait_until(lambda: any(map(holds, directory.glob("trials/*/.lock"))), worker)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.drawn
def test_killed_workers_lose_no_finished_trial_and_duplicate_none(
    kind: str, text_file: Path, space_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where: list[str] = []
    if kind == "postgresql":
        where = [f"--study={request.getfixturevalue('server')}"]
    directory = tmp_path / "sweep"
    flags = runs.make_sweep_flags(
        text_file, directory, f"--space={space_file}", f"--trials={TRIALS}", *where
    )
    workers = [start(flags) for _ in range(2)]
    commands.wait_until((directory / "trials.jsonl").exists, workers[0], 100)
    chance = random.Random(f"{draws.SEED} {kind}")
    before: dict[int, dict] = {}
    ended = ("complete", "pruned", "diverged", "failed")
    for _ in range(KILLS):
        place = chance.randrange(2)
        wait_for_work(directory, workers[place])
        time.sleep(chance.uniform(0, 2))
        wait_for_work(directory, workers[place])
        if (directory / "trials.jsonl").exists():
            before |= {row["trial"]: row for row in rows(directory) if row["state"] in ended}
        workers[place].kill()
        workers[place].communicate()
        workers[place] = start(flags)
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    found = {row["trial"]: row for row in rows(directory)}
    assert len(found) == TRIALS and {r["state"] for r in found.values()} <= {"complete", "pruned"}
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
    ended = (
        r"trial 0 complete at (\S+): .*; 1 of 2 trials, 1 complete, best \1 \(trial 0\), about \d"
    )
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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_trials_writes_the_results_and_gives_the_next_ones_back(
    number: signal.Signals,
    text_file: Path,
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = f"--space={space_file}", "--trials=2"
    flags = runs.make_sweep_flags(text_file, tmp_path, *more)
    write = report.write_trials

    def stop(*given: Any) -> None:
        monkeypatch.undo()
        write(*given)
        signal.raise_signal(number)

    monkeypatch.setattr(report, "write_trials", stop)  # After the first trial.
    stopped = commands.run("sweep", *flags)
    assert stopped.returncode == 128 + number, stopped.stderr
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


@pytest.mark.process
@pytest.mark.parametrize("module", ["optuna", "sqlalchemy"])
def test_a_missing_module_gives_a_one_line_error(module: str) -> None:
    code = (
        f"import runpy, sys; sys.modules[{module!r}] = None; "
        "sys.argv[1:] = ['--config=experiments/quick.py', '--seeds=1']; "
        "runpy.run_module('lstm_jax.sweep', run_name='__main__')"
    )
    result = commands.run_python("-c", code)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: sweeps need {module}")
    assert result.stderr.endswith(": pip install 'lstm-jax[sweep]'\n")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "use either --space"),
        ({"seeds": 2, "space_file": "space.py"}, "use either --space"),
        ({"seeds": 2, "trials": 3}, "remove --trials"),
        ({"seeds": 2, "sampler": "tpe"}, "remove --trials"),
        ({"seeds": 2, "seed": 0}, "remove --trials"),
    ],
)
def test_contradictory_options_raise_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search.prepare_sweep(config_lib.Config(), "quick", **options)


def test_a_sweep_is_prepared_from_options(
    tiny_config: ConfigDict, text_file: Path, tmp_path: Path
) -> None:
    tiny_config.data.path = str(text_file)
    experiment = config_lib.complete_config(tiny_config)
    directory = tmp_path / "sweep"
    prepared = search.prepare_sweep(experiment, "tiny", seeds=3, directory=str(directory))
    assert prepared.trials == 3
    assert isinstance(prepared.study.pruner, optuna.pruners.NopPruner)
    assert prepared.study.study_name == "tiny_seeds3" and prepared.directory == directory
    assert prepared.experiment.data.path == str(text_file) and prepared.experiment.data.sha256
    assert {path.name for path in directory.iterdir()} == {"study.db"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no space file"),
        ("x = 1", "has no function get_overrides"),
        ("def f(:", "line 1: invalid syntax"),
        ("import nothing_like_it", "line 1: ModuleNotFoundError"),
        ("import sys\nsys.exit(5)", "space file .*space.py, line 2: SystemExit: 5$"),
        ("import sys\ndef get_overrides(trial):\n    sys.exit(5)", "line 3: SystemExit: 5$"),
        ("def get_overrides(trial):\n    return 3", "returned int, not a dict"),
        ("def get_overrides(trial):\n    return 1 / 0", "line 2: ZeroDivisionError"),
        (
            "def get_overrides(trial):\n    return {'optimizer.learning_rat': 1e-3}",
            "there is no field config.optimizer.learning_rat: did you mean",
        ),
        ("def get_overrides(trial):\n    return {'seed': 'a'}", "must be of type int"),
        (
            "def get_overrides(t):\n"
            "    return {'optimizer.step_at': t.suggest_categorical('at', [(0.5, 0.7), (0.9,)])}",
            r"the parameter 'at' has the value \(0.5, 0.7\), and Optuna keeps only numbers, ",
        ),
        (
            "import optuna\ndef get_overrides(trial):\n    raise optuna.TrialPruned",
            r"get_overrides\(trial\) raised TrialPruned: return valid fields",
        ),
        (
            "def get_overrides(t):\n    return {'num_epochs': t.suggest_int('n', -3, 1)}",
            "config.num_epochs is",
        ),
        (
            "def get_overrides(t):\n    return {'data.path': t.suggest_categorical('p', ['a'])}",
            "space.py: it changes data.path, but losses on different texts or tokens can't be",
        ),
        (
            "def get_overrides(t):\n    return {'data.min_count': t.suggest_int('n', 2, 3)}",
            "space.py: it changes data.min_count, but losses on different texts or tokens can't be",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_a_broken_space_gives_a_one_line_error(
    code: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(UserError, match=message) as caught:
        space.load_space(path).draw_trials(config_lib.Config())
    assert len(str(caught.value).splitlines()) == 1


def test_a_grid_needs_finite_values_and_visits_each_once(tmp_path: Path) -> None:
    path = tmp_path / "space.py"

    def make_grid() -> dict[str, list[Any]]:
        loaded = space.load_space(path)
        return loaded.make_grid(loaded.draw_trials(config_lib.Config()))

    path.write_text(runs.SPACE)
    with pytest.raises(UserError, match="a grid needs a finite number of values of 'rate'"):
        make_grid()
    path.write_text(
        "def get_overrides(t):\n"
        "    return {'seed': t.suggest_int('s', 0, 4, step=2),\n"
        "            'optimizer.name': t.suggest_categorical('o', ['adam', 'sgd'])}"
    )
    found, grid = space.load_space(path), make_grid()
    assert grid == {"s": [0, 2, 4], "o": ["adam", "sgd"]}
    path.write_text(
        "def get_overrides(t):\n"
        "    return {'optimizer.momentum': t.suggest_float('m', 0.0, 0.3, step=0.1)}"
    )
    assert make_grid()["m"][-1] == 0.3, "3 * 0.1 > 0.3"
    path.write_text(
        "def get_overrides(t):\n    return {'seed': t.suggest_int('s', 3, 5, log=True)}"
    )
    assert make_grid() == {"s": [3, 4, 5]}
    path.write_text(
        "def get_overrides(t):\n"
        "    epochs = t.suggest_categorical('epochs', [1, 2])\n"
        "    return {'num_epochs': epochs, 'seed': t.suggest_int('s', 0, 4 * epochs)}"
    )
    with pytest.raises(UserError, match="the same range in every trial, unlike 's'"):
        make_grid()
    sampler = study.SamplerSettings("grid", 0, grid).make_sampler(0)
    record = optuna.create_study(sampler=sampler)
    drawn = [found.draw_config(record.ask(), config_lib.Config())[0] for _ in range(6)]
    assert len({tuple(overrides.values()) for overrides in drawn}) == 6


def test_a_grid_over_parameters_of_some_trials_raises_an_error(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    path = tmp_path / "space.py"
    path.write_text(
        "def get_overrides(t):\n"
        "    name = t.suggest_categorical('name', ['adam', 'sgd'])\n"
        "    if name == 'adam':\n"
        "        return {'optimizer.name': name}\n"
        "    return {'optimizer.name': name,\n"
        "            'optimizer.momentum': t.suggest_categorical('momentum', [0.8, 0.9])}"
    )
    directory = tmp_path / "sweep"
    with pytest.raises(
        UserError, match="the same parameters .* in every trial, unlike 'momentum': ch"
    ):
        search.prepare_sweep(
            *(config_lib.complete_config(tiny_config), "tiny"),
            space_file=str(path),
            sampler="grid",
            directory=str(directory),
        )
    assert not directory.exists()


RANDOM = study.SamplerSettings("random", 0, {})


def make_study(directory: Path, name: str = "tiny") -> optuna.Study:
    return study.open_study(
        directory, None, name, {}, ["x"], RANDOM, optuna.pruners.HyperbandPruner(1, 9)
    )


def start_trial(record: optuna.Study) -> optuna.Trial:
    """Start a trial as a worker does."""
    with warnings.catch_warnings(action="ignore"):  # Heartbeats are for `Study.optimize`.
        return record.ask()


def detect_death(directory: Path, record: optuna.Study) -> None:
    """Let all workers be dead for an hour, and detect it."""
    with contextlib.closing(sqlite3.connect(directory / study.DATABASE)) as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
        database.commit()
    study.get_storage(record).queue_dead(record._study_id)


def list_states(record: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in record.trials]


@pytest.mark.parametrize("name", ["tpe", "random", "grid"])
def test_samplers_depend_only_on_the_seed(name: str) -> None:
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        grid = {"x": [i / 20 for i in range(20)], "y": [0.0, 1.0]}
        settings = study.SamplerSettings(name, seed, grid)
        record = optuna.create_study(sampler=settings.make_sampler(0))
        points = []
        for _ in range(14):
            if number:  # The trials of other workers come in between.
                record.sampler = settings.make_sampler(99)
            trial = record.ask()
            record.sampler = settings.make_sampler(trial.number)
            points.append((trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)))
            record.tell(trial, sum(points[-1]))
        drawn.append(points)
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 14


def test_parameters_do_not_depend_on_the_worker_that_draws_them(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train", lambda *unused: 0)
    monkeypatch.setattr(search, "_measure", lambda *unused: 1.0)
    drawn = []
    for workers in (1, 4):
        directory = tmp_path / str(workers)
        directory.mkdir()
        for trials in range(4 // workers, 5, 4 // workers):
            record = make_study(directory)
            searched = make_rate_space()
            search.run_worker(
                search.Sweep(record, RANDOM, tiny_config, searched, directory, trials)
            )
        drawn.append([trial.params["x"] for trial in record.trials])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nonsense", "is not the URL of a database"),
        ("postgresql://me:secret@127.0.0.1:1/db", "can't use the database: .*refused"),
        ("postgresql://me:secret@127.0.0.1:port/db", "is not the URL of a database"),
        ("postgresq//me:secret@127.0.0.1/db", "is not the URL of a database"),
        ("sqlite:////nowhere/at/all.db", "can't use the database in /nowhere/at/all.db"),
        ("oracle_or_so://x", "is not the URL of a database"),
    ],
)
def test_a_study_that_cannot_be_opened_gives_a_one_line_error(
    location: str, message: str, tmp_path: Path
) -> None:
    if location.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(UserError, match=message) as caught:
        storage.open_storage(tmp_path / study.DATABASE, location)
    assert len(str(caught.value).splitlines()) == 1 and "secret" not in str(caught.value)


def test_a_trial_of_a_dead_worker_is_resumed_once(tmp_path: Path) -> None:
    record = make_study(tmp_path)
    trial = start_trial(record)
    value = trial.suggest_float("x", 0, 1)
    trial.report(3.0, 1)
    trial.should_prune()  # Record its Hyperband rung.
    for _ in range(2):  # Two other workers detect it.
        detect_death(tmp_path, record)
    assert list_states(record) == [TrialState.WAITING]
    resumed, new = start_trial(record), start_trial(record)
    assert resumed.suggest_float("x", 0, 1) == value != new.suggest_float("x", 0, 1)
    first, second = record.trials
    assert first.intermediate_values == {1: 3.0} and not second.intermediate_values
    assert any("rung" in key for key in first.system_attrs)
    assert not study.get_storage(record).queue_again(trial), "another worker has it"
    assert list_states(record) == [TrialState.RUNNING] * 2
    record.tell(resumed, 2.0)
    record.tell(new, state=TrialState.PRUNED)
    detect_death(tmp_path, record)
    assert list_states(record) == [TrialState.COMPLETE, TrialState.PRUNED]


def test_a_trial_that_kills_every_worker_fails(tmp_path: Path) -> None:
    record = make_study(tmp_path)
    for _ in range(4):
        start_trial(record)
        detect_death(tmp_path, record)
    # A worker that a signal stops, such as a job at its time limit, starts the count again.
    stopped = start_trial(record)
    stopped.set_user_attr(storage.REASON, "an earlier one")
    assert study.get_storage(record).queue_again(stopped)
    assert not study.get_storage(record).queue_again(stopped)
    assert storage.REASON not in record.trials[0].user_attrs
    for _ in range(5):
        assert list_states(record) == [TrialState.WAITING]
        start_trial(record)
        detect_death(tmp_path, record)
    report.write_trials(record, tmp_path)
    (row,) = rows(tmp_path)
    assert (row["state"], row["reason"]) == ("failed", "5 workers in a row died training it")


def test_diverged_trials_are_pruned_with_their_reason(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_study(tmp_path)
    error = NotFiniteError("the loss is not finite")
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=error))
    search.run_worker(search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 1))
    (row,) = rows(tmp_path)
    assert row["state"] == "diverged" and "is not finite" in row["reason"]


def make_rate_space() -> space.Space:
    return space.Space(
        "tiny.py", lambda trial: {"optimizer.learning_rate": trial.suggest_float("x", 1e-3, 1e-2)}
    )


@pytest.mark.slow
def test_a_trial_reports_validations_after_epochs(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.validate_every_steps = 50
    record = make_study(tmp_path)
    search.run_worker(search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 1))
    assert list(record.trials[0].intermediate_values) == [1, 2]
    measured = runs.read_losses(tmp_path / "trials" / "0000")
    assert [step for step, name, _ in measured if name == "validation"] == [0, 50, 70, 100, 140]


def test_a_directory_in_use_does_not_fail_its_trial(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    record = make_study(tmp_path)
    sweep = search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 1)
    with (
        lock.hold_lock(tmp_path / "trials" / "0000"),
        pytest.raises(UnavailableError, match="is training in"),
    ):
        search.run_worker(sweep)
    assert list_states(record) == [TrialState.WAITING]


def test_failed_trials_in_a_row_stop_the_sweep(
    tiny_config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = UserError("the training text is too short")
    monkeypatch.setattr(training, "train", mock.Mock(side_effect=error))
    record = make_study(tmp_path)
    sweep = search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 3)
    with pytest.raises(UserError, match="3 trials in a row failed"):
        search.run_sweep(sweep)
    assert "All trials: " in capsys.readouterr().out, "the results of earlier trials are written"
    assert [row["state"] for row in rows(tmp_path)] == ["failed"] * 3


@pytest.mark.parametrize("is_resumed", [False, True])
@pytest.mark.parametrize("draws", [False, True])
def test_a_trial_that_another_worker_resumes_is_left_to_it(
    draws: bool, is_resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_study(tmp_path)

    def suspend() -> None:
        # The first heartbeat of the thread may come in between.
        while record.trials[0].state == TrialState.RUNNING:
            detect_death(tmp_path, record)
        if is_resumed:
            start_trial(record)

    def draw(trial: Any) -> Any:
        if draws:
            suspend()
        return make_rate_space().get_overrides(trial)

    def fail(*unused: Any) -> None:
        suspend()
        raise UserError("it is too large")

    monkeypatch.setattr(training, "train", fail)
    sweep = search.Sweep(
        record, RANDOM, config_lib.Config(), space.Space("tiny.py", draw), tmp_path, 1
    )
    assert search._run_trial(sweep, start_trial(record), StopRequest()) is None
    (trial,) = record.trials
    assert trial.state == (TrialState.RUNNING if is_resumed else TrialState.WAITING)
    assert storage.REASON not in trial.user_attrs
    assert (study.OVERRIDES in trial.user_attrs) != draws


def test_no_more_trials_start_than_wanted(tmp_path: Path) -> None:
    record = make_study(tmp_path)
    study.get_storage(record).limit = 2
    numbers = [start_trial(record).number for _ in range(2)]
    for _ in range(2):
        with pytest.raises(storage.AllStartedError):
            start_trial(record)
    detect_death(tmp_path, record)  # Queued trials start all the same.
    numbers += [start_trial(record).number for _ in range(2)]
    with pytest.raises(storage.AllStartedError):
        start_trial(record)
    study.get_storage(record).limit = 3
    assert [*numbers, start_trial(record).number] == [0, 1, 0, 1, 2]
    assert len(record.trials) == 3


def test_a_directory_with_a_trial_of_another_study_raises_an_error(tmp_path: Path) -> None:
    first = start_trial(record := make_study(tmp_path))
    directory = study.get_trial_directory(tmp_path, record.trials[0])
    study.claim_directory(directory, record.trials[0])
    study.get_storage(record).queue_again(first)
    study.claim_directory(directory, start_trial(record))
    (tmp_path / study.DATABASE).unlink()
    start_trial(record := make_study(tmp_path))
    # An error after which `run_sweep` does not write the trials of this study over the others.
    with pytest.raises(UnavailableError, match="0000 has a trial of another study: use another"):
        study.claim_directory(directory, record.trials[0])


def test_a_study_of_another_space_or_of_no_sweep_raises_an_error(tmp_path: Path) -> None:
    make_study(tmp_path, "one")
    pruner = optuna.pruners.NopPruner()
    grid = {"x": [0, 1]}
    for sampler, parameters, message in (
        (RANDOM, ["x", "y"], r"with the parameters \['x'\], and not \['x', 'y'\]"),
        (
            study.SamplerSettings("random", 0, grid),
            ["x"],
            r"with the grid \{\}, and not \{'x': \[0, 1\]\}",
        ),
        (
            study.SamplerSettings("grid", 0, grid),
            ["x"],
            "with the --sampler 'random', and not 'grid'",
        ),
        (RANDOM._replace(seed=1), ["x"], "with the --seed 0, and not 1"),
    ):
        with pytest.raises(UserError, match=message):
            study.open_study(tmp_path, None, "one", {}, parameters, sampler, pruner)
    url = f"sqlite:///{tmp_path / study.DATABASE}"
    optuna.create_study(storage=url, study_name="two", direction="maximize")
    with pytest.raises(UserError, match="'two' exists, but is not from a sweep"):
        make_study(tmp_path, "two")


QUOTES = ['"""; import os; os.mkdir("ran"); """', "line\nos.mkdir('ran') back\\slash\\'\"$(x) "]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUOTES)
def test_names_are_quoted_in_the_files_of_a_sweep(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / name.replace("/", "|")
    directory.mkdir()
    (directory / "space.py").write_text(runs.SPACE)
    searched = space.load_space(directory / "space.py")
    record = make_study(directory)
    for loss in (3.0, 2.0):
        trial = start_trial(record)
        trial.set_user_attr(study.OVERRIDES, searched.draw_config(trial, config_lib.Config())[0])
        record.tell(trial, loss)
    experiment = config_lib.complete_config({"data": {"path": f"/{name}"}})
    summary = report.write_report(record, directory, experiment)
    found = runpy.run_path(str(directory / report.BEST))["get_config"]()
    assert found.data.path == f"/{name}" and found.optimizer.schedule in ("cosine", "linear")
    assert not (tmp_path / "ran").exists() and not (directory / "ran").exists()
    offered = shlex.split(summary.partition("Train it: ")[2].partition("\nGenerate text")[0])
    best = min(rows(directory), key=lambda row: row["validation_loss"])["trial"]
    assert offered == [
        *("python", "-m", "lstm_jax.main", "--config", str(directory / "best.py")),
        *("--workdir", str(directory / f"best-{best:04}")),
    ]


@pytest.mark.parametrize(
    "location",
    [
        "postgresql://u:p4ss w0rd@[::1/x",
        "postgresql://u:p4ss@w0rd@127.0.0.1:1/db",
        "postgresql://u:p4ss@[w0rd",
        "postgresql://127.0.0.1/db?password=p4ss&sslpassword=w0rd",
        "postgresql//u:p4ss w0rd@host/db",
        "postgresql:u:p4ss:w0rd@host/db",
        "p4ss w0rd",
    ],
)
def test_no_message_shows_a_password(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: sqlalchemy.URL, **settings: Any) -> None:
        # Error messages of database drivers can contain the whole URL.
        shown = url.render_as_string(hide_password=False)
        raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception(f"no host {shown} is there"))

    monkeypatch.setattr(sqlalchemy, "create_engine", fail)
    with pytest.raises(UserError) as caught:
        storage.open_storage(tmp_path / study.DATABASE, location)
    assert len(str(caught.value).splitlines()) == 1
    assert "p4ss" not in str(caught.value) and "w0rd" not in str(caught.value)


def is_stopped(done: commands.Done) -> bool:
    """Return whether a full disk stopped a command; check that it printed one line."""
    code, _, errors = done
    assert code in (0, 2) and " failed" not in errors and errors.count("error: ") == (code == 2)
    # SQLite has its own message.
    assert code == 0 or re.search("No space left|disk is full", errors.splitlines()[-1]), errors
    return code == 2


@pytest.mark.process
def test_a_full_disk_loses_no_trial_of_a_sweep(
    swept: Path, text_file: Path, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a full disk a worker can't even queue its trial again, so it seems dead.
    monkeypatch.setattr(storage, "BEAT_SECONDS", 1)
    monkeypatch.setattr(storage, "STALE_SECONDS", 3)
    with disks.mounted(tmp_path / "disk", "-o", "size=300k") as disk:
        results, more = [], (f"--space={space_file}", "--trials=2")
        for size in ("300k", "400k", "600k", "64m"):
            disks.resize(disk, size)
            flags = runs.make_sweep_flags(text_file, disk / "sweep", *more)
            results.append(is_stopped(commands.run("sweep", *flags)))
        found = rows(disk / "sweep")
    assert results[0] and results[1] and not results[-1]
    for row, expected in zip(found, rows(swept), strict=True):
        for field in ("state", "overrides", "losses_by_epoch"):
            assert row[field] == expected[field]
    assert [row["state"] for row in found] == ["complete"] * 2


@pytest.mark.slow
def test_a_signal_takes_effect_where_nothing_is_half_done(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send a signal while Optuna starts a trial, and while it records the result."""
    tiny_config.max_steps = 2
    record, signals = make_study(tmp_path), StopRequest()
    sweep = search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 2)
    for name, states in (("ask", [TrialState.WAITING]), ("tell", [TrialState.COMPLETE])):
        method, signals = getattr(record, name), StopRequest()

        def call(*given: Any, method: Any = method, signals: Any = signals, **named: Any) -> Any:
            result = method(*given, **named)
            signals.handle_signal(signal.SIGTERM, None)
            return result

        with monkeypatch.context() as patched, pytest.raises(Stopped, match="143"):
            patched.setattr(record, name, call)
            search.run_worker(sweep, signals)
        assert sorted(list_states(record)) == states
    search.run_worker(sweep)
    assert [row["state"] for row in rows(tmp_path)] == ["complete"] * 2


def test_a_signal_waits_until_all_parameters_are_drawn(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    """A resumed trial would draw the rest from the beginning of its random numbers."""
    record, signals = make_study(tmp_path), StopRequest()

    def draw(trial: Any) -> dict[str, Any]:
        trial.suggest_float("x", 0, 1)
        signals.handle_signal(signal.SIGTERM, None)
        return {"optimizer.learning_rate": trial.suggest_float("y", 1e-3, 1e-2)}

    sweep = search.Sweep(record, RANDOM, tiny_config, space.Space("tiny.py", draw), tmp_path, 1)
    with pytest.raises(Stopped, match="143"):
        search.run_worker(sweep, signals)
    (trial,) = record.trials
    assert trial.state == TrialState.WAITING and [*trial.params] == ["x", "y"]


def test_a_mistake_in_a_space_fails_one_trial(tiny_config: ConfigDict, tmp_path: Path) -> None:
    record = make_study(tmp_path)
    searched = space.Space("tiny.py", lambda trial: {"num_epochs": -1})
    with pytest.raises(UserError, match="tiny.py: config.num_epochs is -1"):
        search.run_worker(search.Sweep(record, RANDOM, tiny_config, searched, tmp_path, 2))
    assert [row["state"] for row in rows(tmp_path)] == ["failed"]


@pytest.mark.parametrize(("max_steps", "state"), [(0, "PRUNED"), (10, "WAITING")])
def test_a_bad_trial_is_pruned_after_an_epoch_unless_it_is_trained(
    max_steps: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=2.0)
    record = study.open_study(tmp_path, None, "tiny", {}, ["x"], RANDOM, pruner)

    def train(config: Any, directory: Path, watch: Any) -> int:
        for epoch in (0, 0.5, 1):
            row = {"split": "validation", "step": int(10 * epoch), "epoch": epoch, "loss": 3.0}
            watch(row)
        return 130  # It is trained to the end, and then interrupted.

    monkeypatch.setattr(training, "train", train)
    experiment = config_lib.complete_config({"num_epochs": 2, "max_steps": max_steps})
    sweep = search.Sweep(record, RANDOM, experiment, make_rate_space(), tmp_path, 1)
    with pytest.raises(Stopped) if max_steps else contextlib.nullcontext():
        assert search._run_trial(sweep, start_trial(record), StopRequest()) is None
    (trial,) = record.trials
    assert trial.state == TrialState[state]
    assert trial.value == (3.0 if state == "PRUNED" else None)
    assert trial.intermediate_values == {1: 3.0}


def test_a_signal_in_training_gives_the_trial_back(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_study(tmp_path)
    monkeypatch.setattr(training, "train", lambda *unused: 143)
    with pytest.raises(Stopped, match="143"):
        search.run_worker(search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 1))
    assert list_states(record) == [TrialState.WAITING]


def test_an_unexpected_error_counts_as_a_death(tiny_config: ConfigDict, tmp_path: Path) -> None:
    record = make_study(tmp_path)
    tiny_config.data.path = "x"
    sweep = search.Sweep(record, RANDOM, tiny_config, make_rate_space(), tmp_path, 1)
    for _ in range(5):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="a bug"):
            patch.setattr(training, "train", mock.Mock(side_effect=ValueError("a bug")))
            search.run_worker(sweep)
    search.run_worker(sweep)
    assert list_states(record) == [TrialState.FAIL]
