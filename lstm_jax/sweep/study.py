"""The Optuna study that the workers of a sweep share: its storage, trials and samplers."""

import contextlib
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import optuna
import sqlalchemy
from optuna.distributions import CategoricalChoiceType
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial

from lstm_jax.errors import UnavailableError, UserError, one_line

# In the directory of a sweep: the study, unless --study names another.
DATABASE = "study.db"
# A worker writes a heartbeat into its trial at this interval, and is dead if it has not done so for
# `STALE_SECONDS`.
BEAT_SECONDS, STALE_SECONDS = 10, 90
_MAX_RETRIES = 10
_DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}

# Attributes of a trial, which it keeps when it is run again.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"
REASON = "reason"  # Why it failed or diverged.

_EXPERIMENT = "experiment"  # An attribute of a study: fields of the config.


@contextlib.contextmanager
def use_optuna() -> Iterator[None]:
    """Accept Optuna's experimental functions; convert errors of its storage to one line."""
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            yield
    except (OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise UnavailableError(
            f"the study can't be read or written ({_describe(error)}): fix this, then resume with "
            "the same command"
        ) from None


def make_retry() -> Retry:
    """Return the callback that queues an interrupted trial again, with its parameters and losses.

    Optuna calls it for trials of dead workers, if their storage has heartbeats.
    """
    return Retry(_MAX_RETRIES, inherit_intermediate_values=True)


def get_number(trial: FrozenTrial) -> int:
    """Return the number of a trial, which it keeps when it is run again."""
    first = Retry.retried_trial_number(trial)
    return trial.number if first is None else first


def get_directory(sweep: Path, trial: FrozenTrial) -> Path:
    """Return the working directory of a trial in that of a sweep."""
    return sweep / "trials" / f"{get_number(trial):04}"


def list_trials(study: Study) -> list[FrozenTrial]:
    """Return the last attempt at each trial."""
    trials = study.get_trials(deepcopy=False)
    return list({get_number(trial): trial for trial in trials}.values())


def make_sampler(
    name: str, seed: int, grid: Mapping[str, Sequence[CategoricalChoiceType]], number: int
) -> BaseSampler:
    """Return the sampler of the attempt `number`; a grid takes the point of this number.

    The parameters depend only on the seed and the earlier trials, not on the process that draws
    them, and two workers never draw the same.
    """
    seed_of_trial = (1_000_003 * seed + number) % 2**32
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed_of_trial, multivariate=True, constant_liar=True)
    if name == "grid":
        return optuna.samplers.GridSampler(grid, seed=seed % 2**32)
    return optuna.samplers.RandomSampler(seed=seed_of_trial)


def open_study(
    directory: Path,
    location: str | None,
    name: str,
    fields: Mapping[str, object],
    pruner: optuna.pruners.BasePruner,
) -> Study:
    """Open or create the study of a sweep, at `location` or in the sweep's directory.

    `fields` are those of the experiment that all workers share, as in JSON: lists for tuples.
    Raise `UserError` if the study can't be reached or written, or is for another experiment.
    """
    storage = _open_storage(directory, location)
    study = optuna.create_study(
        storage=storage, study_name=name, pruner=pruner, load_if_exists=True
    )
    # Read the trials first: another worker may add one now, but only after the attribute.
    is_empty = not study.get_trials(deepcopy=False)
    known = study.user_attrs.get(_EXPERIMENT, {})
    if is_empty and not known:
        study.set_user_attr(_EXPERIMENT, known := fields)
    for field, value in fields.items():
        if known.get(field) != value:
            raise UserError(
                f"the study {name!r} was made for another experiment (config.{field} was "
                f"{known.get(field)!r:.80} and is {value!r:.80}): use another --workdir or --name"
            )
    return study


def _open_storage(directory: Path, location: str | None) -> BaseStorage:
    """Open or create the database, or the journal file, of a study."""
    if location and "://" not in location:
        return JournalStorage(JournalFileBackend(location))
    try:
        url = sqlalchemy.make_url(location or f"sqlite:///{directory.absolute() / DATABASE}")
    except (sqlalchemy.exc.ArgumentError, ValueError):  # Its message may show a password.
        raise UserError(
            "--study is not the URL of a database, such as postgresql://user:password@host/name"
        ) from None
    if driver := _DRIVERS.get(url.drivername):
        url = url.set(drivername=f"{url.drivername}+{driver}")
    is_file = url.get_backend_name() == "sqlite"
    settings = {"timeout": 60} if is_file else {"connect_timeout": 10}
    for _ in range(4):
        try:
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": settings},
                heartbeat_interval=BEAT_SECONDS,
                grace_period=STALE_SECONDS,
                heartbeat_stale_trial_callback=make_retry(),
            )
        except ImportError as error:
            raise UserError(
                f"can't use {url.drivername}: {error.__cause__}: "
                "pip install 'lstm-jax[sweep-servers]'"
            ) from None
        except Exception as error:  # Drivers raise exceptions of any type.
            reason = _describe(error)
        time.sleep(random.random())  # Several workers may create the tables at the same time.
    raise UserError(f"can't use the database{f' {url.database}' if is_file else ''}: {reason}")


def _describe(error: Exception) -> str:
    """Return the message of an exception of Optuna or SQLAlchemy without its SQL statement."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return one_line(cause).partition(" [SQL")[0].partition(" (Background")[0][:300]
