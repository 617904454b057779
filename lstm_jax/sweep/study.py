"""The Optuna study that the workers of a sweep share: its trials, sampler and pruner."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalChoiceType
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import BaseTrial, FrozenTrial

from lstm_jax.data import files
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.sweep import storage
from lstm_jax.sweep.storage import ORIGIN

_Grid = Mapping[str, Sequence[CategoricalChoiceType]]  # The values of each parameter.

# In the directory of a sweep: the study, unless --study names another; and the working directories
# of the trials, each with the identity of its trial.
DATABASE, TRIALS, _OWNER = "study.db", "trials", "trial.txt"

# Attributes of a trial, beside those of `storage`.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"

_MADE_FOR = "made_for"  # An attribute of a study.


def open_study(
    directory: Path,
    location: str | None,
    name: str,
    fields: Mapping[str, object],
    parameters: Iterable[str],
    sampler: "SeededSampler",
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
        sampler=sampler,
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
    """Make the working directory of a trial; raise `UserError` if it is another study's."""
    directory.mkdir(parents=True, exist_ok=True)
    path, origin = directory / _OWNER, trial.user_attrs[ORIGIN]
    if not path.exists() and not (directory / workdir.CONFIG).exists():
        files.write_file(path, origin.encode())
    elif not path.exists() or path.read_text() != origin:
        raise UserError(f"{directory} has a trial of another study: use another --workdir")


class SeededSampler(BaseSampler):
    """The sampler `name` (tpe, random or grid), with a separate seed for each trial's number.

    The parameters depend only on the seed and the earlier trials, not on the process that draws
    them or on how often a trial is resumed, and two workers never draw the same.
    """

    def __init__(self, name: str, seed: int, grid: _Grid | None = None) -> None:
        """Store the arguments; a grid needs the values of each parameter."""
        self.name, self.seed, self.grid = name, seed, grid or {}
        self._inner = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        seed = (1_000_003 * self.seed + number) % 2**32
        if self.name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self.name == "grid":
            return optuna.samplers.GridSampler(self.grid, seed=self.seed % 2**32)
        return optuna.samplers.RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the sampler of a trial; a grid takes the point of its number."""
        self._inner = self._make(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that are drawn together."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw these parameters."""
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw another parameter."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)


def make_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    """Return the pruner `name`, none or hyperband.

    Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
    """
    if name == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.HyperbandPruner(1, num_epochs, 3)


def get_storage(study: Study) -> storage.SweepStorage:
    """Return the storage of a study, without Optuna's cache."""
    backend: storage.SweepStorage = study._storage._backend  # type: ignore[attr-defined]
    return backend


def get_trial_directory(directory: Path, trial: BaseTrial) -> Path:
    """Return the working directory of a trial, which its number names."""
    return directory / TRIALS / f"{trial.number:04}"
