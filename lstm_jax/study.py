"""The record of a sweep that its workers share: an Optuna study, and who works on which trial.

Every trial that is being worked on names its worker, which counts a number up in it every few
seconds. A trial whose worker is dead is closed, and whoever sees that first goes on with it: under
a new number, in the same working directory, with the same parameters and what it had reported. No
step of that needs a lock. Should two workers go on with the same trial, or begin one too many, the
lower number stands and the other is dropped.
"""

import contextlib
import copy
import fcntl
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import optuna
import sqlalchemy
from ml_collections import ConfigDict
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lstm_jax import checkpoints, files, lock, workdir
from lstm_jax import config as config_lib
from lstm_jax.errors import UserError, one_line

SAMPLERS = ("tpe", "random", "grid", "cmaes")
PRUNERS = ("hyperband", "none")

# Where the study is kept in the directory of a sweep, unless --study says otherwise.
DATABASE = "study.db"
WORKERS = "workers"
# In the working directory of a trial: what only it, and those that go on with it, know.
OWNER = "trial"

# Attributes of a trial.
_WORKER = "worker"  # Who works on it: host, slash, name.
_BEAT = "beat"  # What its worker counts up.
_RESUMES = "resumes"  # The number of the trial that it goes on with.
_WORKDIR = "workdir"  # The number that its working directory is named by.
_ORIGIN = "origin"  # What its working directory is told from those of other studies by.
_DEATHS = "deaths"  # Workers that died since it last got further, and how far that was.
_GIVEN_BACK = "given_back"  # Its worker closed it in good order.
_DROPPED = "dropped"  # Of one too many.
REASON = "reason"  # Why it failed; a trial that was closed because its worker died has none.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"

# Attributes of a study.
_EXPERIMENT = "experiment"
_PARAMETERS = "parameters"

_BEAT_SECONDS = 10
# Longer than lock.STALE_SECONDS: who goes on finds the lock of the working directory left, too.
_STALE_SECONDS = 90
# So many workers in a row may die of a trial that gets no further, for example by its memory.
_MOST_DEATHS = 5

# Fields by which a study is not told from another: where things are, and what is only shown.
_NOT_COMPARED = ("data.path", "data.directory", "sample.", "mesh.", "checkpoint_every_seconds")

_Made = TypeVar("_Made")

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_DRIVERS |= {"mysql": "mysql+pymysql"}


def open_study(
    directory: Path,
    location: str | None,
    name: str,
    experiment: ConfigDict,
    parameters: Sequence[str],
    sampler: BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> Study:
    """The study of a sweep, made if it is not there yet.

    Args:
      directory: of the sweep.
      location: a database's URL, or journal:FILE. None: SQLite in `directory`.
      name: of the study.
      experiment: the config that trials change.
      parameters: the names of what trials vary.
      sampler: where parameters come from.
      pruner: what ends trials early.

    Raises:
      UserError: if it can't be reached or written, or was made for another experiment or space.
    """
    study = _patiently(
        lambda: optuna.create_study(
            storage=_open_storage(directory, location),
            study_name=name,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
    )
    fields = {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in config_lib.flatten(experiment)
        if not field.startswith(_NOT_COMPARED)
    }
    before = study.user_attrs.get(_EXPERIMENT)
    if before is None:
        if study.get_trials(deepcopy=False) or study.directions != [StudyDirection.MINIMIZE]:
            raise UserError(
                f"there is a study {name!r} already, which is none of a sweep: name another --name"
            )
        study.set_user_attr(_EXPERIMENT, fields)
    elif differing := [f for f in fields if before.get(f) != fields[f]]:
        first = differing[0]
        others = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise UserError(
            f"the study {name!r} was made for another experiment (config.{first} was "
            f"{before.get(first)!r} and is {fields[first]!r}{others}): name another --workdir"
        )
    known = study.user_attrs.get(_PARAMETERS)
    if known is None:
        study.set_user_attr(_PARAMETERS, sorted(parameters))
    elif known != sorted(parameters):
        raise UserError(
            f"the study {name!r} was made for a space of {', '.join(known)}, and this one is of "
            f"{', '.join(sorted(parameters))}: name another --workdir"
        )
    return study


def _open_storage(directory: Path, location: str | None) -> BaseStorage:
    if location is None:
        location = f"sqlite:///{(directory / DATABASE).absolute()}"
    kind, found, rest = location.partition(":")
    if not found:
        raise UserError(
            f"--study {_without_password(location)} is no URL: it is postgresql://..., "
            "mysql://..., sqlite:///FILE or journal:FILE"
        )
    if kind == "journal":
        path = Path(rest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise UserError(f"can't write the journal {path}: {error.strerror}") from None
        try:
            return JournalStorage(JournalFileBackend(str(path)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no journal of Optuna's: {one_line(error)}") from None
    driver, _, _ = kind.partition("+")
    try:
        url = sqlalchemy.make_url(f"{_DRIVERS.get(kind, kind)}:{rest}")
        settings = _connection_settings(driver)
        # Whether it can be reached at all: Optuna's own attempt fails with a page of text.
        probe = sqlalchemy.create_engine(url, connect_args=settings)
        try:
            probe.connect().close()
        finally:
            probe.dispose()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{driver} needs the module {error.name}: pip install 'lstm-jax[sweep-servers]'"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        reason = _without_password(one_line(error))
        raise UserError(
            f"--study {_without_password(location)} is no database's URL: {reason}"
        ) from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = one_line(error).partition(" (Background")[0][:300]
        raise UserError(f"can't reach the database {url}: {reason}") from None
    plain = url.render_as_string(hide_password=False)
    storage = _patiently(lambda: RDBStorage(plain, engine_kwargs={"connect_args": settings}))
    if driver == "sqlite":
        storage.engine.dispose()
        sqlalchemy.event.listen(storage.engine, "connect", _begin_nothing)
        sqlalchemy.event.listen(storage.engine, "begin", _begin_immediate)
    return storage


def _without_password(text: str) -> str:
    """A text with what may be passwords in URLs made unreadable, whatever is wrong with them."""
    return re.sub(r"(//[^:/@\s]*):[^\s]*@", r"\1:***@", text)


def _connection_settings(driver: str) -> dict[str, Any]:
    """How long to wait for a connection, in what the driver calls it."""
    if driver == "sqlite":
        return {"timeout": 60}
    return {"connect_timeout": 10}


def _begin_nothing(connection: Any, record: object) -> None:
    """Keeps Python from beginning SQLite's transactions, which it does after the first reads."""
    connection.isolation_level = None


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    """A transaction reads what no other can change until it has written.

    This and `_begin_nothing` are SQLAlchemy's own recipe. Without it, two processes that read the
    state of a trial both change it.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _patiently(make: Callable[[], _Made]) -> _Made:
    """Tries again where several workers make the tables of a new database at once."""
    for attempt in range(10):
        try:
            return make()
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            last = error
            time.sleep(0.1 * (attempt + 1))
        except RuntimeError as error:  # The tables are those of another version of Optuna.
            raise UserError(f"can't use the study: {one_line(error)[:300]}") from None
    raise UserError(f"can't make the study: {one_line(last)[:300]}")


class SeededSampler(BaseSampler):
    """Any of `SAMPLERS`, seeded anew by the number of each trial.

    So parameters follow from the seed and the trials before, whichever process draws them, and two
    workers never draw the same.
    """

    def __init__(self, name: str, seed: int, grid: Mapping[str, list[Any]] | None = None) -> None:
        """Takes what is drawn from, and for "grid" the values of each parameter."""
        self._name, self._seed, self._grid = name, seed, grid
        self._sampler = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        seed = (1_000_003 * self._seed + number) % 2**32
        if self._name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        if self._name == "grid":
            return optuna.samplers.GridSampler(self._grid or {}, seed=self._seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Draws anew from here."""
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Any:
        """What the sampler draws together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> Any:
        """Draws the parameters that belong together."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Draws one parameter."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        """What the sampler notes; the grid's would only stop Optuna's own loop."""
        if self._name != "grid":
            self._sampler.after_trial(study, trial, state, values)


def make_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    """Hyperband (Li et al. 2018) over epochs, each bracket by successive halving; or nothing."""
    if name == "none":
        return optuna.pruners.NopPruner()
    return _Hyperband(1, num_epochs, 3)


class _Hyperband(optuna.pruners.HyperbandPruner):
    """Hyperband that leaves a trial in its bracket when another worker goes on with it."""

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        first = copy.copy(trial)
        first.number = trial.user_attrs.get(_WORKDIR, trial.number)
        return super()._get_bracket_id(study, first)


def finished(study: Study) -> list[FrozenTrial]:
    """The trials that ended by themselves: complete, pruned, or failed for a reason."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (trial.state == TrialState.FAIL and REASON in trial.user_attrs)
    ]


def running(study: Study) -> list[FrozenTrial]:
    """The trials that are being worked on, or whose worker's death was not noticed yet."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def trial_directory(directory: Path, trial: FrozenTrial) -> Path:
    """The working directory of a trial."""
    return directory / "trials" / f"{trial.user_attrs.get(_WORKDIR, trial.number):04}"


def claim(directory: Path, trial: FrozenTrial) -> None:
    """Makes the working directory of a trial, for it and those that go on with it only.

    Raises:
      UserError: if it holds a trial of another study.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, own = directory / OWNER, trial.user_attrs[_ORIGIN]
    if not path.exists() and not (directory / workdir.CONFIG).exists():
        files.write(path, own.encode())
    elif not path.exists() or path.read_text(encoding="utf-8") != own:
        raise UserError(f"{directory} holds a trial of another study: name another --workdir")


class Worker:
    """One process that works on the trials of a study.

    While it lives it holds a lock on a file of its own in the sweep's directory, by which others on
    the same host see at once that it is dead; those on other hosts see that it no longer counts.
    """

    def __init__(self, study: Study, directory: Path, trials: int) -> None:
        """Takes the study, the sweep's directory and how many trials are wanted in all."""
        self.study = study
        self._trials = trials
        self._directory = directory / WORKERS
        self._name = uuid.uuid4().hex
        self._mine: dict[int, int] = {}  # Number and id of the trials that it works on.
        self._seen: dict[tuple[int, Any], float] = {}
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self._directory / self._name).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in lock.NO_LOCKS:
                raise
            (self._directory / self._name).unlink()  # Others go by its count, then.
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        for number in list(self._mine):
            self.give_back(number)
        (self._directory / self._name).unlink(missing_ok=True)
        self._lock.close()

    def _count(self) -> None:
        beat = 0
        while not self._done.wait(_BEAT_SECONDS):
            beat += 1
            for identity in list(self._mine.values()):
                # A database that can't be reached for a while is no reason to end; one that has
                # closed the trial meanwhile is noticed when it is reported to.
                with contextlib.suppress(Exception):
                    self.study._storage.set_trial_user_attr(identity, _BEAT, beat)

    def next(self) -> optuna.Trial | None:
        """A trial to work on: one whose worker died, else a new one; None if all are begun."""
        self._close_dead()
        for orphan in self._orphans():
            if trial := self._resume(orphan):
                return trial
        if len(finished(self.study)) + len(running(self.study)) >= self._trials:
            return None
        trial = self._add({_ORIGIN: uuid.uuid4().hex})
        before = [
            other
            for other in self.study.get_trials(deepcopy=False)
            if other.number < trial.number and not _is_closed(other)
        ]
        if len(before) >= self._trials:
            self._drop(trial)
            return None
        return trial

    def give_back(self, number: int) -> None:
        """Closes a trial that this worker leaves, so that any worker goes on with it."""
        identity = self._mine.pop(number, None)
        with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
            if identity is not None:
                self.study._storage.set_trial_user_attr(identity, _GIVEN_BACK, True)
            self.study.tell(number, state=TrialState.FAIL)

    def tell(
        self, trial: optuna.Trial, state: TrialState, loss: float | None = None, reason: str = ""
    ) -> None:
        """Ends a trial; does nothing if it was taken from this worker."""
        try:
            if reason:
                trial.set_user_attr(REASON, reason)
            self.study.tell(trial, loss, state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            if not trial.storage.get_trial(trial._trial_id).state.is_finished():
                raise
        self._mine.pop(trial.number, None)

    def _add(self, user_attrs: Mapping[str, Any], like: FrozenTrial | None = None) -> optuna.Trial:
        """A new trial that is this worker's from the first."""
        ticket = f"{socket.gethostname()}/{self._name}/{uuid.uuid4().hex}"
        attributes = {**user_attrs, _WORKER: ticket}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=like.params if like else None,
                distributions=like.distributions if like else None,
                intermediate_values=like.intermediate_values if like else None,
                user_attrs=attributes,
                system_attrs={
                    name: value
                    for name, value in (like.system_attrs if like else {}).items()
                    if name in ("grid_id", "search_space") or name.startswith("completed_rung_")
                },
            )
        )
        (mine,) = (t for t in running(self.study) if t.user_attrs.get(_WORKER) == ticket)
        self._mine[mine.number] = mine._trial_id
        return optuna.Trial(self.study, mine._trial_id)

    def _drop(self, trial: optuna.Trial) -> None:
        self._mine.pop(trial.number, None)
        trial.set_user_attr(_DROPPED, True)
        self.study.tell(trial, state=TrialState.FAIL)

    def _close_dead(self) -> None:
        for trial in running(self.study):
            if trial.number not in self._mine and self._is_dead(trial):
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        host, _, rest = trial.user_attrs.get(_WORKER, "").partition("/")
        path = self._directory / rest.partition("/")[0]
        if host == socket.gethostname() and path.is_file():
            return not _is_locked(path)
        # By this process's own clock: no two hosts' clocks need to agree.
        key = trial.number, trial.user_attrs.get(_BEAT)
        now = time.monotonic()
        return now - self._seen.setdefault(key, now) > _STALE_SECONDS

    def _orphans(self) -> Iterator[FrozenTrial]:
        """Trials that were closed because their worker died, and that nobody goes on with."""
        trials = self.study.get_trials(deepcopy=False)
        resumed: dict[int, int] = {}  # The first that went on with each.
        for trial in trials:
            resumed.setdefault(trial.user_attrs.get(_RESUMES, -1), trial.number)
        for trial in trials:
            # Of two that went on with the same the second is one too many, whatever became of it.
            first = resumed.get(trial.user_attrs.get(_RESUMES, -2), trial.number)
            dropped = _DROPPED in trial.user_attrs or first < trial.number
            if _is_closed(trial) and trial.number not in resumed and not dropped:
                yield trial

    def _resume(self, orphan: FrozenTrial) -> optuna.Trial | None:
        kept = (OVERRIDES, _ORIGIN)
        attributes = {n: v for n, v in orphan.user_attrs.items() if n in kept}
        saved_in = trial_directory(self._directory.parent, orphan) / workdir.CHECKPOINTS
        reached = [len(orphan.intermediate_values), *checkpoints.steps(saved_in)[-1:]]
        deaths, before = orphan.user_attrs.get(_DEATHS, (0, None))
        deaths = (deaths if reached == before else 0) + (_GIVEN_BACK not in orphan.user_attrs)
        attributes |= {
            _RESUMES: orphan.number,
            _WORKDIR: orphan.user_attrs.get(_WORKDIR, orphan.number),
            _DEATHS: (deaths, reached),
        }
        trial = self._add(attributes, orphan)
        for other in self.study.get_trials(deepcopy=False):
            if other.user_attrs.get(_RESUMES) == orphan.number and other.number < trial.number:
                self._drop(trial)
                return None
        if deaths >= _MOST_DEATHS:
            self.tell(trial, TrialState.FAIL, reason=f"{deaths} workers in a row died of it")
            return None
        return trial


def _is_closed(trial: FrozenTrial) -> bool:
    """Whether a trial ended by no doing of its own."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
