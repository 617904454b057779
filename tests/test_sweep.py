"""Run sweeps with real workers that are killed at random, on files and on a server."""

import contextlib
import json
import os
import random
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from ml_collections import ConfigDict
from optuna.trial import TrialState

import commands
import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import ensemble, lock, metrics, workdir
from lstm_jax.sweep import options, report, search, space, study
from lstm_jax.sweep.worker import Worker, claim_directory

ROOT = Path(__file__).parents[1]
# The number of workers to kill for each kind of study, and the seed of the moments.
KILLS = draws.TIMES
# Enough trials for one to run at every kill: the other worker finishes two or three of them while a
# killed worker restarts.
TRIALS = 2 + 3 * KILLS


def start(flags: list[str]) -> subprocess.Popen[str]:
    """Start a worker."""
    command, pipe = [sys.executable, "-m", "lstm_jax.sweep", *flags], subprocess.PIPE
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
@pytest.mark.parametrize(
    "kind",
    [
        "sqlite",
        pytest.param("journal", marks=pytest.mark.skipif(draws.TIMES == 1, reason="a drawn test")),
        "postgresql",
    ],
)
@pytest.mark.drawn
def test_killed_workers_lose_no_finished_trial_and_duplicate_none(
    kind: str, text_file: Path, space_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where: list[str] = []
    if kind == "journal":
        where = [f"--study=journal:{tmp_path / 'shared.journal'}"]
    elif kind == "postgresql":
        where = [f"--study={request.getfixturevalue('server')}"]
    directory = tmp_path / "sweep"
    flags = runs.make_sweep_flags(
        text_file, directory, f"--space={space_file}", f"--trials={TRIALS}", *where
    )
    workers = [start(flags) for _ in range(2)]
    chance = random.Random(f"{draws.SEED} {kind}")
    before: dict[int, dict] = {}
    for _ in range(KILLS):
        place = chance.randrange(2)
        wait_for_work(directory, workers[place])
        time.sleep(chance.uniform(0, 2))
        wait_for_work(directory, workers[place])
        if (directory / "trials.jsonl").exists():
            before |= {row["trial"]: row for row in rows(directory) if row["state"] != "running"}
        workers[place].kill()
        workers[place].communicate()
        workers[place] = start(flags)
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    found = {row["trial"]: row for row in rows(directory)}
    assert len(found) == TRIALS and {r["state"] for r in found.values()} <= {"complete", "pruned"}
    assert len({row["workdir"] for row in found.values()}) == TRIALS
    for number, row in before.items():
        assert found[number] == row, "a finished trial changed"
    for row in found.values():
        measured = metrics.read_metrics(Path(row["workdir"]) / workdir.METRICS)
        steps = [(r["step"], r["split"]) for r in measured]
        assert len(set(steps)) == len(steps), "a resumed trial repeated a step"
    assert (directory / "report.html").exists()


@pytest.mark.slow
def test_one_worker_is_reproducible_and_best_py_is_the_best_config(
    swept: Path, text_file: Path, space_file: Path, tmp_path: Path
) -> None:
    flags = runs.make_sweep_flags(text_file, tmp_path, f"--space={space_file}", "--trials=2")
    assert "Best of 2 trials" in run(flags)
    results = [
        [(r["overrides"], r["losses_by_epoch"], r["state"]) for r in rows(directory)]
        for directory in (swept, tmp_path)
    ]
    assert results[0] == results[1]
    best = min(rows(tmp_path), key=lambda row: row["validation_loss"])
    settings = config_lib.complete_config(runpy.run_path(str(tmp_path / "best.py"))["get_config"]())
    trained = workdir.load_config(Path(best["workdir"]))
    assert settings == config_lib.change_fields(trained, {"data.sha256": ""})
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "src=" not in page

    # The same command has nothing left to do; another experiment raises an error.
    done = commands.run("sweep", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    other = commands.run("sweep", *flags, "--config.num_epochs=3")
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "made for another experiment (config.num_epochs was 1 and is 3)" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("population", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_between_trials_writes_the_report_and_gives_the_next_ones_back(
    population: int,
    number: signal.Signals,
    text_file: Path,
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = 2 * population
    more = f"--space={space_file}", f"--population={population}", f"--trials={trials}"
    flags = runs.make_sweep_flags(text_file, tmp_path, *more)
    write = report.write_trials

    def stop(*given: Any) -> None:
        monkeypatch.undo()
        write(*given)
        signal.raise_signal(number)

    monkeypatch.setattr(report, "write_trials", stop)  # After the first trials.
    stopped = commands.run("sweep", *flags)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert "Best of " in stopped.stdout and "Traceback" not in stopped.stderr
    before = [row for row in rows(tmp_path) if row["state"] == "complete"]
    assert len(before) == population
    for name in (report.BEST, report.PAGE):
        assert (tmp_path / name).exists()
    run(flags)
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["complete"] * trials and found[:population] == before


@pytest.mark.slow
def test_seeds_are_a_population(text_file: Path, tmp_path: Path) -> None:
    output = run(runs.make_sweep_flags(text_file, tmp_path, "--seeds=3"))
    assert "validation loss of 3 seeds: mean " in output and "test loss of 3 seeds: " in output
    assert sorted(row["overrides"]["seed"] for row in rows(tmp_path)) == [0, 1, 2]
    written = output + (tmp_path / report.PAGE).read_text()
    assert not (tmp_path / report.BEST).exists() and "best.py" not in written
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
        ({"seeds": 2, "pruner": "hyperband"}, "a population can't be pruned"),
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
    assert (prepared.trials, prepared.population) == (3, 3)
    assert prepared.study.study_name == "tiny_seeds3" and prepared.directory == directory
    assert prepared.experiment.data.path == str(text_file) and prepared.experiment.data.sha256
    assert {path.name for path in directory.iterdir()} == {"workers", "trials", "study.db"}


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
            "import optuna\ndef get_overrides(trial):\n    raise optuna.TrialPruned",
            r"get_overrides\(trial\) raised TrialPruned: return valid fields",
        ),
        (
            "def get_overrides(t):\n    return {'num_epochs': t.suggest_int('n', -3, 1)}",
            "config.num_epochs is",
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
        space.load_space(path).check(config_lib.Config())
    assert len(str(caught.value).splitlines()) == 1


def test_a_grid_needs_finite_values_and_visits_each_once(tmp_path: Path) -> None:
    path = tmp_path / "space.py"
    path.write_text(runs.SPACE)
    with pytest.raises(UserError, match="a grid needs a finite number of values of 'rate'"):
        space.load_space(path).grid()
    path.write_text(
        "def get_overrides(t):\n"
        "    return {'seed': t.suggest_int('s', 0, 4, step=2),\n"
        "            'optimizer.name': t.suggest_categorical('o', ['adam', 'sgd'])}"
    )
    found = space.load_space(path)
    assert found.grid() == {"s": [0, 2, 4], "o": ["adam", "sgd"]}
    path.write_text(
        "def get_overrides(t):\n"
        "    return {'optimizer.momentum': t.suggest_float('m', 0.0, 0.3, step=0.1)}"
    )
    assert space.load_space(path).grid()["m"][-1] == 0.3, "3 * 0.1 > 0.3"
    record = optuna.create_study(sampler=study.make_sampler("grid", 0, found.grid()))
    drawn = [found.overrides(record.ask()) for _ in range(6)]
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
    with pytest.raises(UserError, match="only some trials have the parameters momentum, but a gr"):
        search.prepare_sweep(
            *(config_lib.complete_config(tiny_config), "tiny"),
            space_file=str(path),
            sampler="grid",
            directory=str(directory),
        )
    assert not directory.exists()


def make_study(directory: Path, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    return study.open_study(
        directory, None, "tiny", {}, ["x"], sampler, study.make_pruner("hyperband", 9)
    )


def make_dead_worker(
    record: optuna.Study, directory: Path, trials: int
) -> tuple[Worker, optuna.Trial]:
    """Return a worker and its trial in the state after kill -9."""
    worker = Worker(record, directory, trials).__enter__()
    trial = worker.next()
    assert trial is not None
    worker._done.set()
    worker._thread.join()
    worker._lock.close()
    return worker, trial


@pytest.mark.parametrize("name", options.SAMPLERS)
def test_samplers_depend_only_on_the_seed(name: str) -> None:
    drawn = []
    for seed in (1, 1, 2):
        grid = {"x": [i / 20 for i in range(20)], "y": [0.0, 1.0]}
        record = optuna.create_study(sampler=study.make_sampler(name, seed, grid))
        points = []
        for _ in range(14):
            trial = record.ask()
            points.append((trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)))
            record.tell(trial, sum(points[-1]))
        drawn.append(points)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nonsense", "is not the URL of a database"),
        ("postgresql://me:secret@127.0.0.1:1/db", "can't use the database: .*refused"),
        ("postgresql://me:secret@127.0.0.1:port/db", "is not the URL of a database"),
        ("postgresq//me:secret@127.0.0.1/db", "is not the URL of a database"),
        ("sqlite:////nowhere/at/all.db", "can't use the database in /nowhere/at/all.db"),
        ("oracle_or_so://x", "is not the URL of a database"),
        ("journal:/proc/nothing/here", "the study in /proc/nothing/here can't be"),
    ],
)
def test_a_study_that_cannot_be_opened_gives_a_one_line_error(
    location: str, message: str, tmp_path: Path
) -> None:
    if location.startswith("postgresql"):
        pytest.importorskip("psycopg")
    sampler = study.make_sampler("random", 0)
    pruner = study.make_pruner("none", 1)
    with pytest.raises(UserError, match=message) as caught:
        study.open_study(tmp_path, location, "x", {}, [], sampler, pruner)
    assert len(str(caught.value).splitlines()) == 1 and "secret" not in str(caught.value)


def test_a_trial_of_a_dead_worker_is_resumed_once(tmp_path: Path) -> None:
    record = make_study(tmp_path, study.make_sampler("random", 0))
    _, trial = make_dead_worker(record, tmp_path, 2)
    value = trial.suggest_float("x", 0, 1)
    trial.report(3.0, 1)
    trial.should_prune()  # Record its Hyperband rung.
    first = record.trials[trial.number]
    # Two other workers ask for trials.
    with Worker(record, tmp_path, 2) as one, Worker(record, tmp_path, 2) as other:
        resumed, new = one.next(), other.next()
        assert resumed is not None and new is not None and other.next() is None
        assert resumed.suggest_float("x", 0, 1) == value
        (frozen,) = (t for t in study.list_running(record) if t.number == resumed.number)
        assert frozen.intermediate_values == {1: 3.0}
        rungs = [{k for k in t.system_attrs if "rung" in k} for t in (first, frozen)]
        assert rungs[0] == rungs[1] and rungs[0]
        pruner: Any = record.pruner
        brackets = [pruner._get_bracket_id(record, t) for t in (first, frozen)]
        assert brackets[0] == brackets[1]
        assert study.get_trial_directory(tmp_path, frozen).name == f"{trial.number:04}"
        one.tell(resumed, TrialState.COMPLETE, 2.0)
        other.tell(new, TrialState.PRUNED)
    assert [t.value for t in study.list_finished(record)] == [2.0, None]
    assert [t.number for t in report.list_trials(record)] == [resumed.number, new.number]


def test_a_trial_that_kills_every_worker_fails(tmp_path: Path) -> None:
    record = make_study(tmp_path, study.make_sampler("random", 0))
    for _ in range(4):
        make_dead_worker(record, tmp_path, 1)
    for _ in range(6):  # Workers that end normally, such as jobs at their time limit, don't count.
        with Worker(record, tmp_path, 1) as worker:
            assert worker.next() is not None
    make_dead_worker(record, tmp_path, 1)
    with Worker(record, tmp_path, 1) as worker:
        assert worker.next() is None
    (failed,) = study.list_finished(record)
    assert failed.user_attrs[study.REASON] == "5 workers in a row died training it"


@pytest.mark.slow
def test_diverged_trials_are_pruned_with_their_reason(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    searched = space.Space(
        "tiny.py",
        lambda trial: {
            "optimizer.learning_rate": trial.suggest_categorical("rate", [1e30]),
            "optimizer.max_gradient_norm": 0.0,
        },
    )
    record = make_study(tmp_path, study.make_sampler("random", 0))
    search.run_worker(search.Sweep(record, tiny_config, searched, tmp_path, 1, 1))
    (row,) = rows(tmp_path)
    assert row["state"] == "diverged" and "is not finite" in row["reason"]


def make_rate_space() -> space.Space:
    return space.Space(
        "tiny.py", lambda trial: {"optimizer.learning_rate": trial.suggest_float("x", 1e-3, 1e-2)}
    )


def test_a_directory_in_use_does_not_fail_its_trial(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    record = make_study(tmp_path, study.make_sampler("random", 0))
    sweep = search.Sweep(record, tiny_config, make_rate_space(), tmp_path, 1, 1)
    with (
        lock.hold_lock(tmp_path / "trials" / "0000"),
        pytest.raises(UnavailableError, match="is training in"),
    ):
        search.run_worker(sweep)
    assert study.list_finished(record) == [] == study.list_running(record)


@pytest.mark.slow
def test_failed_trials_in_a_row_stop_the_sweep(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.batches.batch_size = 100_000
    record = make_study(tmp_path, study.make_sampler("random", 0))
    sweep = search.Sweep(record, tiny_config, make_rate_space(), tmp_path, 3, 3)
    with pytest.raises(UserError, match="3 trials in a row failed"):
        search.run_worker(sweep)
    assert [row["state"] for row in rows(tmp_path)] == ["failed"] * 3


@pytest.mark.slow
def test_a_damaged_member_fails_no_trial_of_its_population(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.max_steps = 2
    record = make_study(tmp_path, study.make_sampler("random", 0))
    sweep = search.Sweep(record, tiny_config, make_rate_space(), tmp_path, 2, 2)

    def stop(*unused: Any) -> None:
        raise search.Stopped(143)

    with monkeypatch.context() as patched, pytest.raises(search.Stopped):
        patched.setattr(search, "_report", stop)  # After the first checkpoint.
        search.run_worker(sweep)
    member = tmp_path / "trials" / "0001"
    sums = member / workdir.CHECKPOINTS / "0" / "SHA256SUMS"
    content = sums.read_bytes()
    sums.write_bytes(b"")
    with pytest.raises(UnavailableError, match=f"can't resume the training in {member}: every ch"):
        search.run_worker(sweep)
    assert study.list_finished(record) == [] == study.list_running(record)
    sums.write_bytes(content)
    search.run_worker(sweep)
    assert [row["state"] for row in rows(tmp_path)] == ["complete"] * 2


def test_a_trial_does_not_take_over_the_directory_of_another_study(tmp_path: Path) -> None:
    record = make_study(tmp_path, study.make_sampler("random", 0))
    _, trial = make_dead_worker(record, tmp_path, 1)
    directory = tmp_path / "trials" / "0000"
    claim_directory(directory, record.trials[trial.number])
    with Worker(record, tmp_path, 1) as worker:
        resumed = worker.next()
        assert resumed is not None
        claim_directory(directory, record.trials[resumed.number])
    (tmp_path / options.DATABASE).unlink()
    record = make_study(tmp_path, study.make_sampler("random", 0))
    _, other = make_dead_worker(record, tmp_path, 1)
    with pytest.raises(UserError, match="contains a trial of another study"):
        claim_directory(directory, record.trials[other.number])


def test_a_study_of_another_space_or_of_no_sweep_raises_an_error(tmp_path: Path) -> None:
    sampler, pruner = study.make_sampler("random", 0), study.make_pruner("none", 1)
    for _ in range(2):
        study.open_study(tmp_path, None, "one", {}, ["x"], sampler, pruner)
    with pytest.raises(UserError, match=r"with \['x'\], but this one has \['x', 'y'\]"):
        study.open_study(tmp_path, None, "one", {}, ["x", "y"], sampler, pruner)
    url = f"sqlite:///{tmp_path / options.DATABASE}"
    optuna.create_study(storage=url, study_name="two", direction="maximize")
    with pytest.raises(UserError, match="'two' exists, but is not from a sweep"):
        study.open_study(tmp_path, None, "two", {}, ["x"], sampler, pruner)


def test_importances_of_few_trials_are_called_a_hint(tmp_path: Path) -> None:
    record = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for trials, more in ((29, 29), (30, 1)):
        record.optimize(lambda trial: trial.suggest_float("rate", 0, 1), more)
        page = report.make_page(record, tmp_path)
        assert f"from {trials} complete trials" in page
        assert ("too few to rely on" in page) == (trials == 29)


@pytest.mark.process
def test_the_text_of_pictures_has_the_size_of_the_page_on_any_screen(
    tmp_path: Path, browser: Any
) -> None:
    record = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    record.optimize(lambda t: t.suggest_float("rate", 0, 1) * t.suggest_float("decay", 0, 1), 9)
    page = tmp_path / "report.html"
    page.write_text(report.make_page(record, tmp_path))
    shown = "return [...document.querySelectorAll('svg')].map(x => [x.getBoundingClientRect().width"
    for width in (360, 768, 1280):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        pictures = browser.execute_script(f"{shown}, x.viewBox.baseVal.width])")
        scales = [points and pixels / points for pixels, points in pictures if pixels]
        # The text of axes has 10 points.
        assert len(scales) == 4 and all(10 <= 10 * scale <= 16 for scale in scales), (width, scales)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_study_of_another_grid_is_refused() -> None:
    made = optuna.create_study(sampler=study.make_sampler("grid", -1, {"seed": [0, 1]}))
    for _ in range(2):
        made.ask()
    study.check_grid(made, {"seed": [0, 1]})
    with pytest.raises(UserError, match="another grid or number of seeds"):
        study.check_grid(made, {"seed": [0, 1, 2, 3]})


def test_no_point_of_a_grid_is_drawn_twice_after_a_resumed_trial() -> None:
    """Trials that resume others use up numbers, but not places."""
    grid = {"seed": [0, 1, 2, 3]}
    made = optuna.create_study(sampler=study.make_sampler("grid", 0, grid))
    drawn = []
    for number in range(8):
        made.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.WAITING, user_attrs={study.PLACE: number // 2}
            )
        )
        trial = made.ask()
        drawn.append(trial.suggest_categorical("seed", grid["seed"]))
    assert drawn[::2] == drawn[1::2] and sorted(drawn[::2]) == grid["seed"]
