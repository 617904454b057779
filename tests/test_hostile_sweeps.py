"""Test sweeps made by someone else, on full disks, and with paths that are hard to quote.

A study is data: any content is read or gives a one-line error, none of it runs as code, and
nothing outside of the sweep's directory changes. `draws` says how many random mutations there are.
"""

import copy
import html.parser
import json
import os
import random
import re
import runpy
import shlex
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

import commands
import disks
import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.sweep import options, plots, report, search, space, study
from lstm_jax.sweep.worker import Worker, claim_directory
from test_sweep import make_dead_worker, rows

DRAWN = 15 * draws.TIMES


def open_study(directory: Path, location: str | None = None) -> tuple[optuna.Study, space.Space]:
    """Open the study of a sweep of the default experiment, as a worker does."""
    directory.mkdir(exist_ok=True)
    (directory / "space.py").write_text(runs.SPACE)
    searched = space.load_space(directory / "space.py")
    record = study.open_study(
        directory,
        location,
        "tiny",
        {},
        ["dropout", "rate", "schedule"],
        study.make_sampler("tpe", 0),
        study.make_pruner("hyperband", 9),
    )
    study.check_space(record, searched)
    return record, searched


def fill_study(directory: Path, location: str | None = None, trials: int = 3) -> optuna.Study:
    """Make a study with complete trials, none of them trained, and one released trial."""
    record, searched = open_study(directory, location)
    with Worker(record, directory, trials + 1) as worker:
        for number in range(trials + 1):
            trial = worker.next()
            assert trial is not None
            trial.set_user_attr(study.OVERRIDES, searched.overrides(trial))
            trial.report(2.0 + number, 1)
            trial.should_prune()
            trial.set_user_attr(study.TEST_LOSS, 3.0)
            if number < trials:
                worker.tell(trial, TrialState.COMPLETE, 2.0 + number)
    return record


def use_study(directory: Path, location: str | None = None, trials: int = 5) -> None:
    """Do everything that a worker does with a study, except for training."""
    record, searched = open_study(directory, location)
    with Worker(record, directory, trials) as worker:
        while trial := worker.next():
            frozen = trial.storage.get_trial(trial._trial_id)
            claim_directory(study.get_trial_directory(directory, frozen), frozen)
            trial.set_user_attr(study.OVERRIDES, searched.overrides(trial))
            if 2 not in frozen.intermediate_values:  # A resumed trial keeps its losses.
                trial.report(2.5, 2)
            trial.should_prune()
            worker.tell(trial, TrialState.COMPLETE, 2.5)
    report.write_report(record, directory, config_lib.Config(), searched)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_nothing_in_a_study_is_unpickled(kind: str, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    import pickle

    payload = pickle.dumps(Payload())
    location = None if kind == "sqlite" else f"journal:{tmp_path}/study.journal"
    record, searched = open_study(tmp_path, location)
    names = ("cma:optimizer:0", "optimizer", "cma:0", "x")
    with Worker(record, tmp_path, 12) as worker:
        for number in range(11):
            trial = worker.next()
            assert trial is not None
            searched.overrides(trial)
            for name in names:
                identity, storage = trial._trial_id, trial.storage
                storage.set_trial_system_attr(identity, name, payload.hex())
                storage.set_trial_user_attr(identity, name, payload.hex())
                storage.set_study_system_attr(record._study_id, name, payload.hex())
                storage.set_study_user_attr(record._study_id, name, payload.hex())
            worker.tell(trial, TrialState.COMPLETE, float(number))
    for name in ("tpe", "random", "grid", "cmaes"):
        grid: dict[str, list[Any]] = {
            "rate": [1e-2, 1e-3],
            "schedule": ["cosine"],
            "dropout": [0.0],
        }
        record.sampler = study.make_sampler(name, 0, grid)
        with Worker(record, tmp_path, 99) as worker:
            trial = worker.next()
            assert trial is not None
            searched.overrides(trial)
            worker.tell(trial, TrialState.PRUNED)
    use_study(tmp_path, location)
    assert not (tmp_path / "ran").exists()


# JSON values to replace others with.
STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 10**400, 1.5, -0.0, float("nan"), float("inf"), 1e300),
    *("", "x", "../../outside", "a/../../b", "<script>$\\foo$", "\ud800", "\x1b[2J", [], {}),
    *([[1, 2], 3], {"data.path": "/etc/passwd"}, {"name": "FloatDistribution"}),
]
ATTRIBUTES = (
    *(study.WORKER, study.BEAT, study.RESUMES, study.WORKDIR, study.ORIGIN, study.PLACE),
    *(study.DEATHS, study.GIVEN_BACK, study.DROPPED, study.REASON, study.OVERRIDES),
    study.TEST_LOSS,
)


def iterate_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths of all values within a record."""
    yield path
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, dict | list) else ():
        yield from iterate_paths(value[key], (*path, key))


@pytest.mark.slow
@pytest.mark.drawn
def test_any_value_in_a_journal_is_read_or_gives_a_one_line_error(tmp_path: Path) -> None:
    """Change random values of records, and attributes such as worker, workdir and overrides."""
    place = tmp_path / "sweep"
    journal = tmp_path / "study.journal"
    fill_study(place, f"journal:{journal}")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    chance = random.Random(draws.SEED)
    cases: list[list[Any]] = []
    for name in ATTRIBUTES:
        for value in STRANGE:
            added = {"op_code": 8, "worker_id": "x", "trial_id": 3, "user_attr": {name: value}}
            last = max(i for i, r in enumerate(records) if r["op_code"] == 8)
            cases.append([*records[:last], added, *records[last:]])
    cases = chance.sample(cases, min(DRAWN, len(cases)))
    for _ in range(DRAWN):
        changed = copy.deepcopy(records)
        number = chance.randrange(len(records))
        path = chance.choice([p for p in iterate_paths(changed[number]) if p])
        part = changed[number]
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = chance.choice(STRANGE)
        cases.append(changed)
    num_errors = 0
    for case in cases:
        shutil.rmtree(place)
        journal.write_text("".join(json.dumps(record) + "\n" for record in case))
        try:
            use_study(place, f"journal:{journal}")
        except UserError as error:
            num_errors += 1
            assert len(str(error).splitlines()) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"sweep", "study.journal"}
    assert 0 < num_errors < len(cases)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (study.WORKDIR, "../../outside", r"its workdir is '../../outside'"),
        (study.WORKDIR, 10**9, "its workdir is 1000000000"),
        (study.WORKER, f"{os.uname().nodename}/../../outside/x", "its worker is "),
        (study.OVERRIDES, {"data.path": "/etc/passwd"}, "fields for the parameters of"),
        (study.OVERRIDES, {"init_from": "/outside"}, "fields for the parameters of"),
        (study.TEST_LOSS, "<script>", "its test_loss is '<script>'"),
    ],
)
def test_an_error_names_an_invalid_attribute_of_a_trial(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    location = f"journal:{tmp_path}/study.journal"
    record = fill_study(tmp_path, location)
    inner = record._storage._inner  # type: ignore[attr-defined]
    with Worker(record, tmp_path, 9) as worker:
        trial = worker.next()
        assert trial is not None
        inner.set_trial_user_attr(trial._trial_id, name, value)
    with pytest.raises(UserError, match=message) as caught:
        use_study(tmp_path, location)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("params", "distributions"),
    [
        ({"rate": 5.0}, {"rate": optuna.distributions.FloatDistribution(1e-3, 10, log=True)}),
        ({"rate": "a"}, {"rate": optuna.distributions.CategoricalDistribution(["a"])}),
        ({"else": 1}, {"else": optuna.distributions.IntDistribution(0, 1)}),
    ],
)
def test_parameters_outside_the_space_raise_an_error(
    params: dict[str, Any], distributions: dict[str, Any], tmp_path: Path
) -> None:
    record, _ = open_study(tmp_path)
    like = optuna.trial.create_trial(
        state=TrialState.RUNNING, params=params, distributions=distributions
    )
    with Worker(record, tmp_path, 1) as worker:
        worker._add({study.ORIGIN: "0" * 32}, like)
    with pytest.raises(UserError, match="does not draw '(rate|else)' = "):
        open_study(tmp_path)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "not a journal": lambda path: path.write_text("a diary\n"),
    "a diary without an end": lambda path: path.write_text("a diary"),
    "invalid JSON": lambda path: path.write_text('{"op_code":\n{"op_code":0}\n'),
    "invalid UTF-8": lambda path: path.write_bytes(b'{"op_code":"\xff\xfe"}\n'),
    "an unknown record": lambda path: path.write_text('{"op_code":99}\n'),
    "a missing field": lambda path: path.write_text('{"op_code":0}\n'),
    "another type": lambda path: path.write_text('{"op_code":{}}\n'),
    "deep nesting": lambda path: path.write_text('{"op_code":' + "[" * 100_000 + "\n"),
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a full device": lambda path: path.symlink_to("/dev/full"),
}


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_study_file_gives_a_one_line_error(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "study"
    BROKEN[name](path)
    before = path.read_bytes() if path.is_file() else None
    location = f"journal:{path}" if kind == "journal" else f"sqlite:///{path}"
    with pytest.raises(UserError, match=r"/study|/dev/") as caught:
        use_study(tmp_path / "sweep", location)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600
    assert before is None or path.read_bytes() == before


def test_a_truncated_record_is_dropped_and_a_linked_lock_does_not_block(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    fill_study(tmp_path, f"journal:{journal}")
    whole = journal.read_bytes()
    # A full disk leaves such a record.
    journal.write_bytes(whole + b'{"op_code":8,"worker_id":"me","trial')
    (tmp_path / "study.journal.lock").symlink_to(tmp_path / "nowhere")
    use_study(tmp_path, f"journal:{journal}")
    use_study(tmp_path, f"journal:{journal}")
    assert journal.read_bytes().startswith(whole)
    for line in journal.read_text().splitlines():
        json.loads(line)


def test_a_hostile_database_deletes_and_runs_nothing(tmp_path: Path) -> None:
    fill_study(tmp_path)
    outside, own = tmp_path / "outside.txt", tmp_path / options.DATABASE
    outside.write_text("precious")
    saved = own.read_bytes()
    # An unfinished transaction of several databases: SQLite deletes the file that it names.
    with sqlite3.connect(own, isolation_level=None) as open_one:
        open_one.execute("pragma cache_size=2")
        open_one.execute("begin immediate")
        open_one.execute("create table filler (x)")
        open_one.execute("insert into filler values (randomblob(200000))")
        journal, changed = Path(f"{own}-journal").read_bytes(), own.read_bytes()
        open_one.execute("rollback")
    open_one.close()
    name = str(outside).encode()
    page = struct.pack(">I", 0x40000000 // struct.unpack(">H", saved[16:18])[0] + 1)
    named = page + name + struct.pack(">II", len(name), sum(name))
    own.write_bytes(changed)
    Path(f"{own}-journal").write_bytes(journal + named + bytes.fromhex("d9d505f920a163d7"))
    with pytest.raises(UserError, match="It names another file"):
        use_study(tmp_path)
    assert outside.read_text() == "precious"
    Path(f"{own}-journal").unlink()
    own.write_bytes(saved)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT i FROM n"
    with sqlite3.connect(own) as connection:
        connection.execute(f"CREATE VIEW endless AS {endless}")
    connection.close()
    with pytest.raises(UserError, match="It has a view or trigger, 'endless'"):
        use_study(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory of a sweep whose only worker is dead, and the name of the worker."""
    directory = tmp_path_factory.mktemp("begun")
    record, _ = open_study(directory)
    worker, _ = make_dead_worker(record, directory, 5)
    return directory, worker._name


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


NAMES = (
    *("workers", "trials", "trials/0000", "trials/0000/trial", "trials/0000/output.txt"),
    *("study.db", "study.db-journal", "study.db-wal", "output.txt"),
    *("trials.jsonl", "best.py", "report.html", "workers/WORKER"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "replace"),
    [
        *((name, link) for name in NAMES),
        *((name, pipe) for name in ("trials/0000/trial", "study.db", "output.txt", "best.py")),
        *((name, folder) for name in ("trials", "study.db", "report.html", "workers/WORKER")),
    ],
)
def test_nothing_outside_the_sweep_is_written_or_locked(
    name: str,
    replace: Callable[[Path, Path], None],
    begun: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for picture in ("draw_losses", "draw_parallel_coordinates"):  # Each takes a second.
        monkeypatch.setattr(plots, picture, lambda *arguments, **options: "")
    directory, outside = tmp_path / "sweep", tmp_path / "outside"
    shutil.copytree(begun[0], directory)
    name = name.replace("WORKER", begun[1])
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    is_directory = name in ("workers", "trials", "trials/0000")
    outside.mkdir() if is_directory else outside.write_text("theirs")
    replace(path, outside)

    def run_all() -> None:
        report.check_paths(directory)
        use_study(directory)
        (directory / "trials" / "0000").mkdir(exist_ok=True)
        for output in (directory / search.OUTPUT, directory / "trials" / "0000" / search.OUTPUT):
            search._append(output).close()

    replaced = name in ("trials.jsonl", "best.py", "report.html") and replace is not folder
    if replaced or name.startswith("workers/") or (is_directory and replace is folder):
        run_all()
        # The link does not show that the worker is dead: its counter must stay unchanged first.
        record, _ = open_study(directory)
        assert len(study.list_running(record)) == name.startswith("workers")
    else:
        with pytest.raises((UserError, OSError)) as caught:
            run_all()
        assert str(path) in str(caught.value)
        if name in ("study.db", "workers", "trials", "trials.jsonl", "best.py", "report.html"):
            assert not (directory / "trials" / "0000").exists(), "a trial started too early"
    if is_directory:
        assert list(outside.iterdir()) == []
    else:
        assert outside.read_text() == "theirs"


QUOTES = ['"""; import os; os.mkdir("ran"); """', "line\nos.mkdir('ran') back\\slash\\'\"$(x) "]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUOTES)
def test_names_are_quoted_in_the_files_of_a_sweep(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / name.replace("/", "|")
    record = fill_study(directory)
    _, searched = open_study(directory)
    experiment = config_lib.complete_config({"data": {"path": f"/{name}"}})
    summary = report.write_report(record, directory, experiment, searched)
    found = runpy.run_path(str(directory / report.BEST))["get_config"]()
    assert found.data.path == f"/{name}" and found.optimizer.schedule in ("cosine", "linear")
    assert not (tmp_path / "ran").exists() and not (directory / "ran").exists()
    offered = shlex.split(summary.partition("Train it: ")[2].partition("\nGenerate text")[0])
    best = min(rows(directory), key=lambda row: row["validation_loss"] or 9e9)["trial"]
    assert offered == [
        *("python", "-m", "lstm_jax.main", "--config", str(directory / "best.py")),
        *("--workdir", str(directory / f"best-{best:04}")),
    ]


class _Tags(html.parser.HTMLParser):
    """Collect the names of all elements and the targets of links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links |= {value or "" for name, value in attrs if name == "href"}
        assert not [name for name, _ in attrs if name.startswith("on")]


@pytest.mark.slow
def test_the_report_escapes_names(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$\\foo$ <img src=x onerror=y>'\""
    searched = space.Space(
        evil,
        lambda trial: {
            "optimizer.learning_rate": trial.suggest_float(evil, 1e-3, 1e-1, log=True),
            "optimizer.schedule": trial.suggest_categorical(f"{evil}2", ["cosine", "linear"]),
        },
    )
    record = study.open_study(
        *(tmp_path, None, evil, {}, [evil, f"{evil}2"]),
        *(study.make_sampler("random", 0), study.make_pruner("none", 9)),
    )
    with Worker(record, tmp_path, 6) as worker:
        for number in range(6):
            trial = worker.next()
            assert trial is not None
            trial.set_user_attr(study.OVERRIDES, searched.overrides(trial))
            ending = (TrialState.PRUNED, None, evil) if number == 5 else (TrialState.COMPLETE, 2.0)
            worker.tell(trial, *ending)
    report.write_report(record, tmp_path, config_lib.Config(), searched)
    page = (tmp_path / report.PAGE).read_text()
    tags = _Tags(page)
    assert "svg" in tags.names and not tags.names & {"script", "img", "iframe", "object", "link"}
    assert all(target[0] == "#" or target.startswith("trials/") for target in tags.links)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in page


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
        open_study(tmp_path, location)
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
    swept: Path, text_file: Path, space_file: Path, tmp_path: Path
) -> None:
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


@pytest.mark.process
def test_a_full_disk_under_the_study_loses_no_trial(tmp_path: Path) -> None:
    """Check that a worker that can't even write to release its trial counts as dead."""
    place, failures = tmp_path / "sweep", 0
    with disks.mounted(tmp_path / "disk", "-o", "size=8m") as disk:
        location = f"journal:{disk}/study.journal"
        fill_study(place, location, trials=1)
        filler = disks.fill(disk)
        while True:
            try:
                use_study(place, location, trials=12)
                break
            except UnavailableError as error:
                failures += 1
                assert "No space left" in str(error)
                assert len(str(error).splitlines()) == 1
                os.truncate(filler, filler.stat().st_size - 4096)
        record, _ = open_study(place, location)
        states = [trial.state for trial in study.list_finished(record)]
    assert failures >= 2 and states == [TrialState.COMPLETE] * 12
