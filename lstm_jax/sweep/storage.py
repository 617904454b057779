"""The database that the workers of a sweep share.

No message shows its password, and exceptions of Optuna and of databases become one-line errors.
"""

import contextlib
import datetime
import math
import re
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import sqlalchemy
from optuna.exceptions import (
    ExperimentalWarning,
    OptunaError,
    StorageInternalError,
    UpdateFinishedTrialError,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, Trial, TrialState

from lstm_jax.errors import UnavailableError, UserError, one_line

_DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
# A worker writes a heartbeat into its trial at this interval, and is dead if it has not done so for
# `STALE_SECONDS`. That is longer than `lock.STALE_SECONDS`, so that its directory is free, too.
BEAT_SECONDS, STALE_SECONDS = 10, 90
# A trial fails if this number of workers in a row die training it, for lack of memory for example.
_MAX_DEATHS = 5

# Attributes of a trial.
ORIGIN = "origin"  # Identifies its working directory.
_DEATHS = "deaths"  # The number of workers in a row that died training it.
REASON = "reason"  # Why it failed or diverged.


class AllStartedError(Exception):
    """Every trial of the sweep has been started."""


class SweepStorage(RDBStorage):
    """Optuna's storage, which queues a trial again if its worker was stopped or has died.

    A new trial gets its first heartbeat in the transaction that creates it: if its worker died
    between two transactions, no other worker would resume it.
    """

    limit: float = math.inf  # No new trial gets this number or a larger one.

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Any
    ) -> Any:
        trial: Any = super()._get_prepared_new_trial(study_id, template_trial, session)
        if trial.number >= self.limit:
            raise AllStartedError
        session.add(models.TrialHeartbeatModel(trial_id=trial.trial_id))
        kind, origin = models.TrialUserAttributeModel, uuid.uuid4().hex
        self._set_trial_attr_without_commit(session, kind, trial.trial_id, ORIGIN, origin)
        return trial

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Change the state of a trial, as Optuna does; a queued one that runs gets a heartbeat."""
        if state == TrialState.RUNNING:
            self.record_heartbeat(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def record_heartbeat(self, trial_id: int) -> None:
        """Record that the worker of a trial is alive."""
        with contextlib.suppress(StorageInternalError):  # It may be temporarily unreachable.
            super().record_heartbeat(trial_id)

    def read_held(self, trial: Trial) -> FrozenTrial:
        """Read a trial; raise `UpdateFinishedTrialError` if another worker has taken it over."""
        found = self.get_trial(trial._trial_id)
        if not _is_held(found, trial):
            raise UpdateFinishedTrialError
        return found

    def queue_again(self, trial: Trial | FrozenTrial, is_dead: bool = False) -> bool:
        """Queue a running trial again; it keeps its number, parameters and losses.

        Return whether it was still running, since the same time: otherwise another worker has it.
        If too many workers in a row died, it fails for good.
        """
        kind, trial_id = models.TrialUserAttributeModel, trial._trial_id
        deaths = trial.user_attrs.get(_DEATHS, 0) + 1 if is_dead else 0
        with _create_scoped_session(self.scoped_session) as session:
            found: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            if not _is_held(found, trial):
                return False
            self._set_trial_attr_without_commit(session, kind, trial_id, _DEATHS, deaths)
            session.query(kind).filter_by(trial_id=trial_id, key=REASON).delete()
            if deaths < _MAX_DEATHS:
                found.state = TrialState.WAITING
            else:
                reason = f"{deaths} workers in a row died training it"
                self._set_trial_attr_without_commit(session, kind, trial_id, REASON, reason)
                found.state, found.datetime_complete = TrialState.FAIL, datetime.datetime.now()
        return True

    def queue_dead(self, study_id: int) -> None:
        """Queue the trials of dead workers again."""
        # Read before the heartbeats, so that `queue_again` sees which have been started since.
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        stale = self._get_stale_trial_ids(study_id)
        for trial in running:
            if trial._trial_id in stale:
                self.queue_again(trial, is_dead=True)


def _is_held(found: Any, trial: Trial | FrozenTrial) -> bool:
    """Return whether a trial, as it is now, still runs since the same time."""
    return bool(found.state == TrialState.RUNNING and found.datetime_start == trial.datetime_start)


def open_storage(database: Path, location: str | None) -> SweepStorage:
    """Open or create the storage of a study: `location`, or by default an SQLite file, `database`.

    Raise `UserError` if it can't be reached or written.
    """
    url = sqlalchemy.URL.create("sqlite", database=str(database.absolute()))
    place = ""
    try:
        if location is not None:
            url = sqlalchemy.make_url(location)
        backend = url.get_backend_name()
        settings = {"connect_timeout": 10}
        if backend == "sqlite":
            settings, place = {"timeout": 60}, f" in {url.database}"
        else:
            url = url.set(drivername=f"{backend}+{_DRIVERS[backend]}")
        # Connect before Optuna does: its error messages have many lines.
        engine = sqlalchemy.create_engine(
            url, connect_args=settings, poolclass=sqlalchemy.pool.NullPool
        )
        engine.connect().close()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{backend} needs the module {error.name}: pip install 'lstm-jax[sweep-servers]'"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError, KeyError):
        raise UserError(  # The error itself may show a part of the password.
            "--study is not the URL of a database, such as postgresql://user:password@host/"
            "database, mysql://... or sqlite:///FILE"
        ) from None
    except Exception as error:  # Drivers raise exceptions of any type.
        reason = _mask_secrets(_describe(error), location or "")
        raise UserError(f"can't use the database{place}: {reason}") from None
    storage = _make_tables(url.render_as_string(hide_password=False), settings)
    if backend == "sqlite":
        _begin_immediately(storage.engine)
    return storage


def _make_tables(url: str, settings: dict[str, int]) -> SweepStorage:
    """Create Optuna's storage; retry, because several workers may create its tables at once."""
    for attempt in range(10):
        time.sleep(0.1 * attempt)
        try:
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                return SweepStorage(
                    url,
                    engine_kwargs={"connect_args": settings},
                    heartbeat_interval=BEAT_SECONDS,
                    grace_period=STALE_SECONDS,
                )
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            last = error
        except RuntimeError as error:  # Another version of Optuna has made the tables.
            raise UserError(f"can't use the database: {one_line(error)[:300]}") from None
    raise last


def _begin_immediately(engine: sqlalchemy.Engine) -> None:
    """Make SQLite lock the database at the start of a transaction, by a recipe of SQLAlchemy.

    Otherwise two processes can read the same trial and both change it.
    """
    engine.dispose()
    listen = sqlalchemy.event.listen
    listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


@contextlib.contextmanager
def convert_errors() -> Iterator[None]:
    """Convert exceptions of Optuna and of databases to a one-line `UnavailableError`."""
    try:
        yield
    except (OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise UnavailableError(
            f"the study can't be read or written ({_describe(error)}): fix this, then resume with "
            "the same command"
        ) from None


def _describe(error: Exception) -> str:
    """Return the message of an exception of Optuna or SQLAlchemy without its SQL statement."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else None
    text = one_line(cause if isinstance(cause, Exception) else error)
    return text.partition(" [SQL")[0].partition(" (Background")[0][:300]


def _mask_secrets(text: str, location: str) -> str:
    """Mask all words of a URL, even a malformed one, that may be part of a password."""
    secret = f"{location.partition('://')[2].partition(':')[2]} {location.partition('?')[2]}"
    words = set(re.findall(r"\w+", f"{secret} {unquote_plus(secret)}".casefold()))
    return re.sub(r"\w+", lambda w: "***" if w[0].casefold() in words else w[0], text)
