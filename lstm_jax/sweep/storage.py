"""Open the storage of a study, which may be untrusted.

A study is data: no code from it runs. A journal or SQLite file must be a regular file that does not
make SQLite open other files. Trials are checked when they are read, no message shows a password,
and exceptions of Optuna and databases become one-line errors.
"""

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_plus

import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial

from lstm_jax.data import files
from lstm_jax.errors import UnavailableError, UserError, one_line

_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}

# A journal starts with this, and none of its records is longer.
_FIRST_BYTES, _MAX_RECORD_BYTES = b'{"op_code":', 2**24
# The last bytes of a rollback journal that names another file, which SQLite deletes after the
# rollback. Optuna's transactions use one database, so they never write one.
_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")


# Returns the trial, or raises `UserError` if no sweep can have written it.
_CheckTrial = Callable[[FrozenTrial], FrozenTrial]


def open_storage(database: Path, location: str | None, check_trial: _CheckTrial) -> BaseStorage:
    """Open or create the storage of a study: `location`, or by default an SQLite file, `database`.

    Raise `UserError` if it can't be reached or written, or is not safe to open.
    """
    if location and location.startswith("journal:"):
        path = Path(location.removeprefix("journal:")).resolve()
        place = f" in {path}"
        with convert_errors(place):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.open_append(path).close()
            with files.open_regular(path) as file:
                if not _FIRST_BYTES.startswith(file.read(len(_FIRST_BYTES))):
                    raise UserError(f"{path} is not an Optuna journal: use another --study")
            journal = JournalStorage(JournalFileBackend(str(path), _JournalLock(path)))
        return cast(BaseStorage, _CheckedStorage(journal, place, check_trial))
    url = sqlalchemy.URL.create("sqlite", database=str(database.absolute()))
    place = ""
    try:
        if location is not None:
            url = sqlalchemy.make_url(location)
        backend = url.get_backend_name()
        settings = {"connect_timeout": 10}
        if backend == "sqlite":
            settings, place = {"timeout": 60}, f" in {url.database}"
            if url.database:
                # A file that the user names may be a link.
                path = Path(url.database)
                _check_sqlite_files(path.resolve() if location else path)
        url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
        # Connect before Optuna does: its error messages have many lines.
        engine = sqlalchemy.create_engine(
            url, connect_args=settings, poolclass=sqlalchemy.pool.NullPool
        )
        with engine.connect() as connection:
            if backend == "sqlite":
                # A view or trigger may run a query that never ends.
                query = "SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')"
                if row := connection.exec_driver_sql(query).first():
                    raise OSError(errno.EINVAL, f"It has a view or trigger, {row[0]!r:.80}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{backend} needs the module {error.name}: pip install 'lstm-jax[sweep-servers]'"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError):
        raise UserError(  # The error itself may show a part of the password.
            "--study is not the URL of a database, such as postgresql://user:password@host/"
            "database, mysql://..., sqlite:///FILE or journal:FILE"
        ) from None
    except Exception as error:  # Drivers raise exceptions of any type.
        reason = _mask_secrets(_describe(error), location or "")
        raise UserError(f"can't use the database{place}: {reason}") from None
    with convert_errors(place):
        made = _make_tables(url.render_as_string(hide_password=False), settings)
    if backend == "sqlite":
        _begin_immediately(made.engine)
    return cast(BaseStorage, _CheckedStorage(get_storage(made), place, check_trial))


def _make_tables(url: str, settings: dict[str, int]) -> RDBStorage:
    """Create Optuna's storage; retry, because several workers may create its tables at once."""
    for attempt in range(1, 10):
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, StorageInternalError):
            return RDBStorage(url, engine_kwargs={"connect_args": settings})
        time.sleep(0.1 * attempt)
    return RDBStorage(url, engine_kwargs={"connect_args": settings})


def _begin_immediately(engine: sqlalchemy.Engine) -> None:
    """Make SQLite lock the database at the start of a transaction, by a recipe of SQLAlchemy.

    Otherwise two processes can read the same trial and both change it.
    """
    engine.dispose()
    listen = sqlalchemy.event.listen
    listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _check_sqlite_files(path: Path) -> None:
    """Raise `OSError` for a database that makes SQLite use other files."""
    for end in ("", "-journal", "-wal", "-shm"):
        file = path.with_name(path.name + end)
        with contextlib.suppress(FileNotFoundError):  # Other workers create and delete them.
            if files.read_tail(file, 8) == _NAMES_ANOTHER:
                what = "It names another file, which SQLite would delete"
                raise OSError(errno.EINVAL, what, str(file))


class _JournalLock(JournalFileOpenLock):
    """An `flock` on the journal, which the operating system releases when the process dies.

    Optuna's own locks are separate files. A dangling link with the name of one would make every
    worker wait forever.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock, then remove an incomplete last record, which a full disk can cause."""
        self._file = files.open_append(self._path)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if files.read_tail(self._path, 1) not in (b"", b"\n"):
            torn = files.read_tail(self._path, _MAX_RECORD_BYTES).rpartition(b"\n")[2]
            descriptor = self._file.fileno()
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(torn))
        return True

    def release(self) -> None:
        self._file.close()


class Guarded:
    """A proxy for an Optuna object whose methods raise one-line errors."""

    def __init__(self, inner: Any, place: str = "") -> None:
        self._inner, self._place = inner, place

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return convert_errors(self._place)(value) if callable(value) else value


class _CheckedStorage(Guarded):
    """A storage that checks each trial when it is read."""

    def __init__(self, inner: BaseStorage, place: str, check_trial: _CheckTrial) -> None:
        super().__init__(inner, place)
        self._check_trial = check_trial

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with convert_errors(self._place):
            return self._check_trial(self._inner.get_trial(trial_id))

    def get_all_trials(self, *args: object, **kwargs: object) -> list[FrozenTrial]:
        with convert_errors(self._place):
            return [self._check_trial(t) for t in self._inner.get_all_trials(*args, **kwargs)]


@contextlib.contextmanager
def convert_errors(place: str = "") -> Iterator[None]:
    """Convert any exception of Optuna to a one-line `UnavailableError`."""
    try:
        yield
    except (UserError, DuplicatedStudyError, UpdateFinishedTrialError):
        raise
    except Exception as error:
        raise UnavailableError(
            f"the study{place} can't be read or written ({_describe(error)}): fix this, then "
            "resume with the same command"
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
