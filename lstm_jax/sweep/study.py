"""The Optuna study that the workers of a sweep share: its storage, trials and samplers."""

import contextlib
import functools
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import optuna
import sqlalchemy
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
    except (OptunaError, sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise UnavailableError(
            f"the study can't be read or written ({one_line(error)[:300]}): fix this, then resume "
            "with the same command"
        ) from None


# Queues an interrupted trial again, with its parameters and losses. Optuna calls it for trials of
# dead workers, if their storage has heartbeats.
with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    retry = Retry(max_retry=10, inherit_intermediate_values=True)


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


def make_sampler(seed: int, grid: Mapping[str, list[object]], number: int) -> BaseSampler:
    """Return the sampler of the attempt `number`: of the grid, or TPE if it is empty.

    The parameters depend only on the seed and the earlier trials, not on the process that draws
    them, and two workers never draw the same.
    """
    if grid:
        return optuna.samplers.GridSampler(grid, seed=seed)  # type: ignore[arg-type]
    seed_of_trial = (1_000_003 * seed + number) % 2**32
    return optuna.samplers.TPESampler(seed=seed_of_trial, multivariate=True, constant_liar=True)


def open_study(
    directory: Path,
    location: str | None,
    name: str,
    fields: Mapping[str, object],
    pruner: optuna.pruners.BasePruner,
) -> Study:
    """Open or create the study of a sweep, at `location` or in the sweep's directory.

    `fields` are those of the experiment that all workers share, as in JSON: lists for tuples.
    Raise `UserError` if the study is for another experiment.
    """
    storage = _open_storage(location or f"sqlite:///{directory.absolute() / DATABASE}")
    study = optuna.create_study(
        storage=storage, study_name=name, pruner=pruner, load_if_exists=True
    )
    known = study.user_attrs.get(_EXPERIMENT)
    if known is None:
        study.set_user_attr(_EXPERIMENT, known := fields)
    for field, value in fields.items():
        if known.get(field) != value:
            raise UserError(
                f"the study {name!r} was made for another experiment (config.{field} was "
                f"{known.get(field)!r:.80} and is {value!r:.80}): use another --workdir or --name"
            )
    return study


def _open_storage(location: str) -> BaseStorage:
    """Open or create the database with this URL, or a journal file."""
    if "://" not in location:
        return JournalStorage(JournalFileBackend(location))
    # By default, SQLite waits 5 seconds for other workers.
    settings = {"timeout": 60} if location.startswith("sqlite") else {}
    open_database = functools.partial(
        RDBStorage,
        location,
        engine_kwargs={"connect_args": settings},
        heartbeat_interval=BEAT_SECONDS,
        grace_period=STALE_SECONDS,
        heartbeat_stale_trial_callback=retry,
    )
    for _ in range(3):  # Several workers may create the tables at the same time.
        with contextlib.suppress(OptunaError, sqlalchemy.exc.SQLAlchemyError):
            return open_database()
        time.sleep(random.random())
    return open_database()
