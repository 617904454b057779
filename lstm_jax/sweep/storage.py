"""Open the database that the workers of a sweep share.

No message shows its password, and exceptions of Optuna and of databases become one-line errors.
"""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote_plus

import sqlalchemy
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.errors import UnavailableError, UserError, one_line

_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
# A worker writes into its trial at this interval. After the second time without it, the worker is
# dead. That is longer than `lock.STALE_SECONDS`, so the working directory is free by then, too.
BEAT_SECONDS, STALE_SECONDS = 10, 90
# A trial fails if this number of workers in a row die training it, for lack of memory for example;
# one that a signal stops starts the count again, as the first.
MAX_DEATHS = 5

# Attributes of a trial: of the user, the number of other trials before it; of Optuna, the numbers
# of those that it resumes.
PLACE, RESUMES = "place", "retry_history"
# It was started by one worker more than there were trials left.
SURPLUS = "surplus"

# Optuna calls heartbeats experimental.
with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    # Queues a trial again, with the same parameters and losses. It is not queued more often.
    queue_again = RetryHeartbeatStaleTrialCallback(MAX_DEATHS - 1, inherit_intermediate_values=True)


class _Storage(RDBStorage):
    """A storage in which each trial has a place from the start, and each running one a heartbeat.

    Optuna does not notice the death of a worker between the start and the first heartbeat.
    """

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        trial = super()._create_new_trial(study_id, template_trial)
        self.record_heartbeat(trial._trial_id)
        if PLACE not in trial.user_attrs:
            before = self.get_all_trials(study_id, deepcopy=False)[: trial.number]
            kinds = ({*t.system_attrs, *t.user_attrs} for t in before)
            place = sum(kind.isdisjoint((RESUMES, SURPLUS)) for kind in kinds)
            self.set_trial_user_attr(trial._trial_id, PLACE, place)
            trial.user_attrs[PLACE] = place
        return trial

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state == TrialState.RUNNING:
            self.record_heartbeat(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def record_heartbeat(self, trial_id: int) -> None:
        with contextlib.suppress(StorageInternalError):  # It may be temporarily unreachable.
            super().record_heartbeat(trial_id)


def open_storage(database: Path, location: str | None) -> RDBStorage:
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
        url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
        # Connect before Optuna does: its error messages have many lines.
        engine = sqlalchemy.create_engine(
            url, connect_args=settings, poolclass=sqlalchemy.pool.NullPool
        )
        engine.connect().close()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{backend} needs the module {error.name}: pip install 'lstm-jax[sweep-servers]'"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError):
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


def _make_tables(url: str, settings: dict[str, int]) -> RDBStorage:
    """Create Optuna's storage; retry, because several workers may create its tables at once."""
    for attempt in range(10):
        time.sleep(0.1 * attempt)
        try:
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                return _Storage(
                    url,
                    engine_kwargs={"connect_args": settings},
                    heartbeat_interval=BEAT_SECONDS,
                    grace_period=STALE_SECONDS,
                    heartbeat_stale_trial_callback=queue_again,
                )
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            last = error
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
