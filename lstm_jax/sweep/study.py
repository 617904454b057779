"""The Optuna study that the workers of a sweep share: its trials, sampler and pruner.

Optuna detects dead workers by the heartbeats of their trials, and queues these again under new
numbers. Such a trial keeps its place, and with it the working directory, sampler and pruner.
"""

import copy
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalChoiceType
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.data import files
from lstm_jax.errors import UserError
from lstm_jax.sweep import storage
from lstm_jax.sweep.storage import PLACE, RESUMES, SURPLUS

_Grid = Mapping[str, Sequence[CategoricalChoiceType]]  # The values of each parameter.

# In the directory of a sweep: the study, unless --study names another; the working directories of
# the trials; and in these, the study that they belong to.
DATABASE, TRIALS, OWNER = "study.db", "trials", "study.txt"

# Attributes of a trial.
REASON = "reason"  # Why it failed or diverged.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"

# Attributes of a study.
_IDENTITY = "identity"
_EXPERIMENT = "experiment"
_PARAMETERS = "parameters"


def open_study(
    directory: Path,
    location: str | None,
    name: str,
    fields: Mapping[str, object],
    parameters: Sequence[str],
    sampler: BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> Study:
    """Open or create the study of a sweep, at `location` or in the sweep's directory.

    `fields` are those of the experiment that all workers share, as in JSON: lists for tuples.
    Raise `UserError` if it can't be reached or written, or is for another experiment or space, or
    if the directory has the trials of another study.
    """
    study = optuna.create_study(
        storage=storage.open_storage(directory / DATABASE, location),
        study_name=name,
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    # Read the trials first: another worker may add one now, but only after the attributes.
    is_empty = not study.get_trials(deepcopy=False)
    before, known = study.user_attrs.get(_EXPERIMENT), study.user_attrs.get(_PARAMETERS)
    is_minimized = study.directions == [StudyDirection.MINIMIZE]
    if is_minimized and before is None and is_empty:
        study.set_user_attr(_IDENTITY, uuid.uuid4().hex)
        study.set_user_attr(_EXPERIMENT, before := fields)
    if not is_minimized or before is None:
        raise UserError(f"the study {name!r} exists, but is not from a sweep: use another --name")
    if differing := [f for f in fields if before.get(f) != fields[f]]:
        first = differing[0]
        others = f" and {len(differing) - 1} more" if differing[1:] else ""
        raise UserError(
            f"the study {name!r} was made for another experiment (config.{first} was "
            f"{before.get(first)!r:.80} and is {fields[first]!r}{others}): use another --workdir"
        )
    if known is None:
        study.set_user_attr(_PARAMETERS, sorted(parameters))
    elif known != sorted(parameters):
        raise UserError(
            f"the study {name!r} was made for a space with {known!r:.200}, but this one has "
            f"{sorted(parameters)}: use another --workdir"
        )
    _claim_trials(directory / TRIALS, study.user_attrs[_IDENTITY])
    return study


def _claim_trials(directory: Path, identity: str) -> None:
    """Make the directory of trials; raise `UserError` if it has those of another study."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / OWNER
    if not any(directory.iterdir()):
        files.write_file(path, identity.encode())
    elif not path.exists() or path.read_text() != identity:
        raise UserError(f"{directory} has the trials of another study: use another --workdir")


def check_grid(study: Study, grid: _Grid) -> None:
    """Raise `UserError` if a trial of a study was drawn from another grid."""
    for trial in study.get_trials(deepcopy=False):
        if trial.system_attrs.get("search_space", grid) != grid:
            raise UserError(
                f"the study {study.study_name!r} was made for another grid or number of seeds: "
                "use another study and --workdir"
            )


class SeededSampler(BaseSampler):
    """The sampler `name` (tpe, random or grid), with a separate seed for each trial's place.

    The parameters depend only on the seed and the earlier trials, not on the process that draws
    them or on how often a trial is resumed, and two workers never draw the same.
    """

    def __init__(self, name: str, seed: int, grid: _Grid | None = None) -> None:
        """Store the arguments; a grid needs the values of each parameter."""
        self._name, self._seed, self._grid = name, seed, grid or {}
        self._inner = self._make(0)

    def _make(self, place: int) -> BaseSampler:
        seed = (1_000_003 * self._seed + place) % 2**32
        if self._name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._name == "grid":
            return optuna.samplers.GridSampler(self._grid, seed=self._seed % 2**32)
        return optuna.samplers.RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the sampler of a trial; a grid takes the point of its place."""
        placed = _put_in_place(trial)
        self._inner = self._make(placed.number)
        self._inner.before_trial(study, placed)

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
    return optuna.pruners.NopPruner() if name == "none" else _Hyperband(1, num_epochs, 3)


class _Hyperband(optuna.pruners.HyperbandPruner):
    """Hyperband that keeps a trial in its bracket when another worker resumes it."""

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        return super()._get_bracket_id(study, _put_in_place(trial))


def _put_in_place(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial with its place as its number."""
    placed = copy.copy(trial)
    placed.number = trial.user_attrs.get(PLACE, trial.number)
    return placed


def give_back(study: Study, number: int) -> None:
    """Queue a trial again that its worker can't end; do nothing if another worker has done so."""
    if trial := next((t for t in list_trials(study) if t.number == number), None):
        if trial.state == TrialState.RUNNING:
            study.tell(number, state=TrialState.FAIL)
        queued = copy.deepcopy(trial)
        queued.system_attrs.pop(RESUMES, None)  # Only deaths in a row count.
        storage.queue_again(study, queued)


def list_trials(study: Study) -> list[FrozenTrial]:
    """Return all trials, except those that another one resumes, and surplus ones."""
    trials = study.get_trials(deepcopy=False)
    resumed = {t.system_attrs[RESUMES][-1] for t in trials if RESUMES in t.system_attrs}
    return [t for t in trials if t.number not in resumed and SURPLUS not in t.user_attrs]


def get_trial_directory(directory: Path, trial: FrozenTrial) -> Path:
    """Return the working directory of a trial, in the directory of its sweep."""
    return directory / TRIALS / f"{trial.user_attrs.get(PLACE, trial.number):04}"
