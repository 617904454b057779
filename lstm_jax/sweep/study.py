"""The Optuna study that the workers of a sweep share: its trials, sampler and pruner."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import CategoricalChoiceType
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import BaseTrial

from lstm_jax.data import files
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import workdir
from lstm_jax.sweep import storage
from lstm_jax.sweep.storage import ORIGIN

# In the directory of a sweep: the study, unless --study names another; and the working directories
# of the trials, each with the identity of its trial.
DATABASE, TRIALS, _OWNER = "study.db", "trials", "trial.txt"

# Attributes of a trial, beside those of `storage`.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"

_MADE_FOR = "made_for"  # An attribute of a study.


class _GridSampler(optuna.samplers.GridSampler):
    def after_trial(self, *unused: Any, **others: Any) -> None:
        """Do nothing: Optuna's method stops `Study.optimize`, which is not running here."""


class SamplerSettings(NamedTuple):
    """Settings of the sampler that draws the parameters of a study's trials."""

    name: str  # tpe, random or grid.
    seed: int
    grid: Mapping[str, Sequence[CategoricalChoiceType]]  # The values of each parameter.

    def make_sampler(self, number: int) -> BaseSampler:
        """Return the sampler of the trial `number`; a grid takes the point of this number.

        The parameters depend only on the seed and the earlier trials, not on the process that draws
        them or on how often a trial is resumed, and two workers never draw the same.
        """
        seed = (1_000_003 * self.seed + number) % 2**32
        if self.name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self.name == "grid":
            return _GridSampler(self.grid, seed=self.seed % 2**32)
        return optuna.samplers.RandomSampler(seed=seed)


def open_study(
    directory: Path,
    location: str | None,
    name: str,
    fields: Mapping[str, object],
    parameters: Iterable[str],
    sampler: SamplerSettings,
    pruner: optuna.pruners.BasePruner,
) -> Study:
    """Open or create the study of a sweep, at `location` or in the sweep's directory.

    `fields` are those of the experiment that all workers share, as in JSON: lists for tuples.
    Raise `UserError` if it can't be reached or written, or is for another experiment, space or
    sampler.
    """
    study = optuna.create_study(
        storage=storage.open_storage(directory / DATABASE, location),
        study_name=name,
        sampler=sampler.make_sampler(0),
        pruner=pruner,
        load_if_exists=True,
    )
    search = {
        "parameters": sorted(parameters),
        "--sampler": sampler.name,
        "--seed": sampler.seed,
        "grid": sampler.grid,
    }
    # Read the trials first: another worker may add one now, but only after the attribute.
    is_empty = not study.get_trials(deepcopy=False)
    made_for = study.user_attrs.get(_MADE_FOR)
    if made_for is None and is_empty and study.directions == [StudyDirection.MINIMIZE]:
        study.set_user_attr(_MADE_FOR, made_for := {"experiment": fields, "search": search})
    if made_for is None:
        raise UserError(f"the study {name!r} exists, but is not from a sweep: use another --name")
    before = made_for["experiment"]
    if differing := [f for f in fields if before.get(f) != fields[f]]:
        first = differing[0]
        others = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise UserError(
            f"the study {name!r} was made for another experiment (config.{first} was "
            f"{before.get(first)!r:.80} and is {fields[first]!r}{others}): use another --workdir"
        )
    for what, value in search.items():
        if (known := made_for["search"][what]) != value:
            raise UserError(
                f"the study {name!r} was made with the {what} {known!r:.200}, and not "
                f"{value!r:.200}: use the same, or another --workdir"
            )
    return study


def claim_directory(directory: Path, trial: BaseTrial) -> None:
    """Make the working directory of a trial; raise `UnavailableError` if it is another study's."""
    directory.mkdir(parents=True, exist_ok=True)
    path, origin = directory / _OWNER, trial.user_attrs[ORIGIN]
    if not path.exists() and not (directory / workdir.CONFIG).exists():
        files.write_file(path, origin.encode())
    elif not path.exists() or path.read_text() != origin:
        raise UnavailableError(f"{directory} has a trial of another study: use another --workdir")


def get_storage(study: Study) -> storage.SweepStorage:
    """Return the storage of a study, without Optuna's cache."""
    return study._storage._backend  # type: ignore[attr-defined]


def get_trial_directory(directory: Path, trial: BaseTrial) -> Path:
    """Return the working directory of a trial, which its number names."""
    return directory / TRIALS / f"{trial.number:04}"
