"""The record of a sweep that its workers share: an Optuna study, and who works on which trial.

Every trial that is being worked on names its worker, which counts a number up in it every few
seconds. A trial whose worker is dead is closed, and whoever sees that first goes on with it: under
a new number, in the same working directory, with the same parameters and what it had reported. No
step of that needs a lock. Should two workers go on with the same trial, or begin one too many, the
lower number stands and the other is dropped.

A study may have been made by someone else. It is data: its trials are checked as they are read
(`_Storage`), their parameters are those that the user's own space draws (`check_space`), and what
Optuna or a database raises becomes one line.
"""

import contextlib
import copy
import errno
import fcntl
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import unquote_plus

import optuna
import sqlalchemy
from ml_collections import ConfigDict
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lstm_jax import config as config_lib
from lstm_jax.errors import UnavailableError, UserError, one_line
from lstm_jax.run import checkpoints, files, lock, workdir
from lstm_jax.sweep.space import Space

# Optuna's CMA-ES is none of them: it unpickles what it finds in a study, which runs code.
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("hyperband", "none")

# Where the study is kept in the directory of a sweep, unless --study says otherwise.
DATABASE = "study.db"
WORKERS = "workers"
TRIALS = "trials"
# In the working directory of a trial: what only it, and those that go on with it, know.
OWNER = "trial"

# Attributes of a trial.
_WORKER = "worker"  # Who works on it: host, slash, name.
_BEAT = "beat"  # What its worker counts up.
_RESUMES = "resumes"  # The number of the trial that it goes on with.
_WORKDIR = "workdir"  # The number that its working directory is named by.
_PLACE = "place"  # How many others were begun before it: what is drawn for it follows from that.
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

_Made = TypeVar("_Made")

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_DRIVERS |= {"mysql": "mysql+pymysql"}
_NO_URL = (
    "--study is no database's URL: it is postgresql://user:password@host/database, mysql://..., "
    "sqlite:///FILE or journal:FILE"
)

# The first bytes of a journal, and more bytes than a record of it has.
_RECORD, _LONGEST_RECORD = b'{"op_code":', 2**24
# The last bytes of a rollback journal that names another file, which SQLite deletes when it is
# done. Optuna's transactions are within one database and never have one.
_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")


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
    study = optuna.create_study(
        storage=_open_storage(directory, location),
        study_name=name,
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    fields = {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in config_lib.flatten(experiment)
        if field in config_lib.COMPARED
    }
    before, known = study.user_attrs.get(_EXPERIMENT), study.user_attrs.get(_PARAMETERS)
    is_minimized = study.directions == [StudyDirection.MINIMIZE]
    if is_minimized and before is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_EXPERIMENT, before := fields)
    if not is_minimized or not isinstance(before, dict):
        raise UserError(
            f"there is a study {name!r} already, which is none of a sweep: name another --name"
        )
    if differing := [f for f in fields if before.get(f) != fields[f]]:
        first = differing[0]
        others = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise UserError(
            f"the study {name!r} was made for another experiment (config.{first} was "
            f"{before.get(first)!r:.80} and is {fields[first]!r}{others}): name another --workdir"
        )
    if known is None:
        study.set_user_attr(_PARAMETERS, sorted(parameters))
    elif known != sorted(parameters):
        raise UserError(
            f"the study {name!r} was made for a space of {known!r:.200}, and this one is of "
            f"{sorted(parameters)}: name another --workdir"
        )
    return study


def check_space(study: Study, searched: Space) -> None:
    """Checks that a space makes of the parameters of each trial what the study says it does.

    Raises:
      UserError: if it doesn't: the study was made for another one.
    """
    for trial in study.get_trials(deepcopy=False):
        made = searched.replay(trial)
        if trial.user_attrs.get(OVERRIDES, made) != made:
            raise UserError(
                f"{searched.name}: it makes something else of the parameters of trial "
                f"{trial.number} than the study says: name another --workdir"
            )


def _open_storage(directory: Path, location: str | None) -> BaseStorage:
    kind, _, rest = (location or "").partition(":")
    if kind == "journal":
        path = Path(rest).resolve()
        with _told(f" in {path}"):
            storage: BaseStorage = _open_journal(path)
        return cast(BaseStorage, _Storage(storage, f" in {path}"))
    url = sqlalchemy.URL.create("sqlite", database=str((directory / DATABASE).absolute()))
    try:
        if location is not None:
            url = sqlalchemy.make_url(location)
        driver = url.get_backend_name()
        url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
        place = f" in {url.database}" if driver == "sqlite" else ""
        if driver == "sqlite" and url.database:
            # Where the user has named it, it may be a link.
            database = Path(url.database)
            _check_sqlite_files(database.resolve() if location else database)
        settings = _connection_settings(driver)
        # Whether it can be reached at all: Optuna's own attempt fails with a page of text.
        probe = sqlalchemy.create_engine(url, connect_args=settings)
        try:
            with probe.connect() as connection:
                if driver == "sqlite":
                    _check_sqlite_schema(connection)
        finally:
            probe.dispose()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{driver} needs the module {error.name}: pip install 'lstm-jax[sweep-servers]'"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError):
        raise UserError(_NO_URL) from None  # The reason may hold a part of the password.
    except Exception as error:  # Drivers raise what they like.
        reason = _without_secrets(_reason(error), location or "")
        raise UserError(f"can't use the database{place}: {reason}") from None
    plain = url.render_as_string(hide_password=False)
    with _told(place):
        made = _patiently(lambda: RDBStorage(plain, engine_kwargs={"connect_args": settings}))
    if driver == "sqlite":
        made.engine.dispose()
        sqlalchemy.event.listen(made.engine, "connect", _begin_nothing)
        sqlalchemy.event.listen(made.engine, "begin", _begin_immediate)
    return cast(BaseStorage, _Storage(get_storage(made), place))


def _open_journal(path: Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.open_append(path).close()
    with files.open_regular(path) as file:
        if not _RECORD.startswith(file.read(len(_RECORD))):
            raise UserError(f"{path} is no journal of Optuna's: name another --study")
    return JournalStorage(JournalFileBackend(str(path), _JournalLock(path)))


class _JournalLock(JournalFileOpenLock):
    """A lock on the journal itself, which ends with the process that holds it.

    Optuna's own are files beside it: whoever finds a link there that leads nowhere waits for ever.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        """Waits for the lock, and drops what a full disk left of a record."""
        file = files.open_append(self._path)
        fcntl.flock(file, fcntl.LOCK_EX)
        if files.read_tail(self._path, 1) not in (b"", b"\n"):
            torn = files.read_tail(self._path, _LONGEST_RECORD).rpartition(b"\n")[2]
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - len(torn))
        self._file = file
        return True

    def release(self) -> None:
        """Lets others write."""
        self._file.close()


def _check_sqlite_files(path: Path) -> None:
    """Raises `OSError` for a database through which SQLite would reach other files."""
    for end in ("", "-journal", "-wal", "-shm"):
        file = path.with_name(path.name + end)
        with contextlib.suppress(FileNotFoundError):  # Those of other workers come and go.
            if files.read_tail(file, 8) == _NAMES_ANOTHER:
                what = "It names another file, which SQLite would delete"
                raise OSError(errno.EINVAL, what, str(file))


def _check_sqlite_schema(connection: sqlalchemy.Connection) -> None:
    """Raises `OSError` for a database that runs queries of its own: they may never end."""
    own = "SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')"
    if found := connection.exec_driver_sql(own).first():
        raise OSError(errno.EINVAL, f"It has a view or trigger, {found[0]!r:.80}")


class _Guarded:
    """Something of Optuna's, all of whose exceptions that come of a study become one line."""

    def __init__(self, inner: Any, place: str = "") -> None:
        self._inner, self._place = inner, place

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return _told(self._place)(found) if callable(found) else found


class _Storage(_Guarded):
    """A storage whose trials are checked as they are read."""

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with _told(self._place):
            return _checked(self._inner.get_trial(trial_id))

    def get_all_trials(self, *arguments: Any, **named: Any) -> list[FrozenTrial]:
        with _told(self._place):
            return [_checked(t) for t in self._inner.get_all_trials(*arguments, **named)]


@contextlib.contextmanager
def _told(place: str = "") -> Iterator[None]:
    """Tells in one line what Optuna raises if a study can't be used, or holds what it can't be."""
    try:
        yield
    except (UserError, DuplicatedStudyError, UpdateFinishedTrialError):
        raise
    except Exception as error:
        raise UnavailableError(
            f"the study{place} can't be read or written ({_reason(error)}): once it can, the same "
            "command goes on"
        ) from None


def _reason(error: Exception) -> str:
    """What an exception of Optuna's or SQLAlchemy's says, without the statement of SQL."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
    text = one_line(cause if isinstance(cause, Exception) else error)
    return text.partition(" [SQL")[0].partition(" (Background")[0][:300]


def _without_secrets(reason: str, location: str) -> str:
    """A text without the words of a URL that may be of a password, whatever is wrong with it."""
    secret = f"{location.partition('://')[2].partition(':')[2]} {location.partition('?')[2]}"
    words = set(re.findall(r"\w+", f"{secret} {unquote_plus(secret)}".casefold()))
    return re.sub(r"\w+", lambda w: "***" if w[0].casefold() in words else w[0], reason)


def _checked(trial: FrozenTrial) -> FrozenTrial:
    """A trial that a study holds, if it is as a sweep makes them.

    Raises:
      UserError: if it isn't.
    """
    attributes, losses = trial.user_attrs, trial.intermediate_values
    wrong = [
        f"{name} is {attributes.get(name)!r:.80}"
        for name, is_valid in _VALID.items()
        if (name in attributes or name in (_ORIGIN, _WORKER))
        and not is_valid(attributes.get(name), trial.number)
    ]
    if not all(_is_natural(e) and _is_loss(loss) for e, loss in losses.items()):
        wrong.append(f"losses are {losses!r:.80}")
    if trial.values is not None and not (len(trial.values) == 1 and _is_loss(trial.values[0])):
        wrong.append(f"values are {trial.values!r:.80}")
    if trial.state == TrialState.WAITING:
        wrong.append("state is WAITING")
    if not isinstance(trial.system_attrs, dict):
        wrong.append(f"system attributes are {trial.system_attrs!r:.80}")
    if wrong:
        raise UserError(
            f"trial {trial.number} of the study is none of a sweep (its {wrong[0]}): name another "
            "study"
        )
    trial._validate()
    return trial


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_loss(value: Any) -> bool:
    """Whether it is a number that a float32 can be."""
    return type(value) in (int, float) and abs(value) < 3.5e38


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


# What each attribute is in a trial with a number.
_VALID: dict[str, Callable[[Any, int], bool]] = {
    _ORIGIN: lambda value, number: _is_text(value, "[0-9a-f]{32}"),
    _WORKER: lambda value, number: _is_text(value, "[^/]+/[0-9a-f]{32}/[0-9a-f]{32}"),
    _BEAT: lambda value, number: _is_natural(value),
    _RESUMES: lambda value, number: _is_natural(value) and value < number,
    _WORKDIR: lambda value, number: _is_natural(value) and value <= number,
    _PLACE: lambda value, number: _is_natural(value) and value <= number,
    _DEATHS: lambda value, number: (
        isinstance(value, list)
        and len(value) == 2
        and _is_natural(value[0])
        and isinstance(value[1], list)
    ),
    REASON: lambda value, number: isinstance(value, str),
    OVERRIDES: lambda value, number: isinstance(value, dict),
    TEST_LOSS: lambda value, number: _is_loss(value),
}


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
    raise last


class SeededSampler(BaseSampler):
    """Any of `SAMPLERS`, seeded anew by the place of each trial.

    So parameters follow from the seed and the trials before, whichever process draws them and
    however often it is gone on with, and two workers never draw the same.
    """

    def __init__(self, name: str, seed: int, grid: Mapping[str, list[Any]] | None = None) -> None:
        """Takes what is drawn from, and for "grid" the values of each parameter."""
        self._name, self._seed, self._grid = name, seed, grid
        self._sampler = _Guarded(self._make(0))

    def _make(self, place: int) -> BaseSampler:
        seed = (1_000_003 * self._seed + place) % 2**32
        if self._name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._name == "grid":
            return optuna.samplers.GridSampler(self._grid or {}, seed=self._seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Draws anew from here."""
        self._sampler = _Guarded(self._make(trial.user_attrs.get(_PLACE, trial.number)))
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

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        with _told():
            return super().prune(study, trial)

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        first = copy.copy(trial)
        first.number = trial.user_attrs.get(_PLACE, trial.number)
        return super()._get_bracket_id(study, first)


def list_finished(study: Study) -> list[FrozenTrial]:
    """The trials that ended by themselves: complete, pruned, or failed for a reason."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (trial.state == TrialState.FAIL and REASON in trial.user_attrs)
    ]


def list_running(study: Study) -> list[FrozenTrial]:
    """The trials that are being worked on, or whose worker's death was not noticed yet."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def get_trial_directory(directory: Path, trial: FrozenTrial) -> Path:
    """The working directory of a trial."""
    return directory / TRIALS / f"{trial.user_attrs.get(_WORKDIR, trial.number):04}"


def make_directory(path: Path) -> None:
    """Makes a directory if it is not there yet.

    Raises:
      UserError: if something else is, such as a link to a directory.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise UserError(f"{path} is a link or a file, where a directory is to be: move it away")


def claim_directory(directory: Path, trial: FrozenTrial) -> None:
    """Makes the working directory of a trial, for it and those that go on with it only.

    Raises:
      UserError: if it holds a trial of another study.
    """
    make_directory(directory.parent)
    make_directory(directory)
    path, own = directory / OWNER, trial.user_attrs[_ORIGIN].encode()
    if not os.path.lexists(path) and not os.path.lexists(directory / workdir.CONFIG):
        files.write_file(path, own)
    elif not os.path.lexists(path) or files.read_bytes(path, 100) != own:
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
        make_directory(self._directory)
        self._lock = files.open_append(self._directory / self._name)
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
        # Of a study that can't be written others take the trials over, as those of a dead worker:
        # its file stays, and is locked no more.
        with contextlib.suppress(UserError, OSError):
            for number in list(self._mine):
                self.give_back(number)
            (self._directory / self._name).unlink()
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
        if len(list_finished(self.study)) + len(list_running(self.study)) >= self._trials:
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
        with contextlib.suppress(ValueError, UpdateFinishedTrialError):
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
        except (ValueError, UpdateFinishedTrialError):
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
        trials = self.study.get_trials(deepcopy=False)
        (mine,) = (trial for trial in trials if trial.user_attrs[_WORKER] == ticket)
        if _PLACE not in mine.user_attrs:
            first = mine.user_attrs.get(_WORKDIR, mine.number)
            place = sum(t.number < first and _RESUMES not in t.user_attrs for t in trials)
            self.study._storage.set_trial_user_attr(mine._trial_id, _PLACE, place)
        self._mine[mine.number] = mine._trial_id
        return optuna.Trial(self.study, mine._trial_id)

    def _drop(self, trial: optuna.Trial) -> None:
        self._mine.pop(trial.number, None)
        trial.set_user_attr(_DROPPED, True)
        self.study.tell(trial, state=TrialState.FAIL)

    def _close_dead(self) -> None:
        for trial in list_running(self.study):
            if trial.number not in self._mine and self._is_dead(trial):
                with contextlib.suppress(ValueError, UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        host, name, _ = trial.user_attrs[_WORKER].split("/")
        path = self._directory / name
        if host == socket.gethostname() and path.is_file():
            with contextlib.suppress(OSError):  # A link, or of a file system without locks.
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
        kept = (OVERRIDES, _ORIGIN, _PLACE)
        attributes = {n: v for n, v in orphan.user_attrs.items() if n in kept}
        saved_in = get_trial_directory(self._directory.parent, orphan) / workdir.CHECKPOINTS
        reached = [len(orphan.intermediate_values), *checkpoints.list_steps(saved_in)[-1:]]
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
    with files.open_append(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
