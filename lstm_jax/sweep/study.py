"""The Optuna study that the workers of a sweep share: attributes, checks, sampler and pruner.

A study may be untrusted: `check_trial` checks each trial when it is read, and `check_space` checks
that the user's own space can draw its parameters.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import optuna
from optuna.distributions import CategoricalChoiceType
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from lstm_jax.errors import UserError
from lstm_jax.sweep import options
from lstm_jax.sweep.space import Space
from lstm_jax.sweep.storage import Guarded, convert_errors, open_storage

_Grid = Mapping[str, Sequence[CategoricalChoiceType]]  # The values of each parameter.

# The trials, in the directory of a sweep.
TRIALS = "trials"

# Attributes of a trial. Only the process that runs the trial writes them.
WORKER = "worker"  # host/name
BEAT = "beat"  # A counter that the worker increments.
RESUMES = "resumes"  # The number of the trial that this one resumes.
WORKDIR = "workdir"  # The number that names its working directory.
PLACE = "place"  # The number of other trials that started before it; determines the sampler's seed.
ORIGIN = "origin"  # Identifies its working directory among those of other studies.
DEATHS = "deaths"  # The number of workers that died since its last progress, and that progress.
GIVEN_BACK = "given_back"  # Its worker stopped before it ended.
DROPPED = "dropped"  # It was closed as a duplicate or surplus trial.
REASON = "reason"  # Why it failed. A trial whose worker died has none.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"

# Attributes of a study.
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
    Raise `UserError` if it can't be reached or written, or is for another experiment or space.
    """
    study = optuna.create_study(
        storage=open_storage(directory / options.DATABASE, location, check_trial),
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
        study.set_user_attr(_EXPERIMENT, before := fields)
    if not is_minimized or not isinstance(before, dict):
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
    return study


def check_space(study: Study, space: Space) -> None:
    """Raise `UserError` unless a space reproduces the overrides of each trial of a study."""
    for trial in study.get_trials(deepcopy=False):
        overrides = space.replay(trial)
        if trial.user_attrs.get(OVERRIDES, overrides) != overrides:
            raise UserError(
                f"{space.name}: its fields for the parameters of trial {trial.number} differ from "
                "those in the study: use another --workdir"
            )


def check_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial; raise `UserError` if it has values that no sweep writes."""
    losses, values, number = trial.intermediate_values, trial.values, trial.number
    fields = {
        **trial.user_attrs,
        "value": values,
        "dict of losses": losses,
        "dict of system attributes": trial.system_attrs,
        "state": trial.state.name,
    }
    deaths = fields.get(DEATHS, [0, []])
    is_valid = {
        ORIGIN: _matches(fields.get(ORIGIN), "[0-9a-f]{32}"),
        WORKER: _matches(fields.get(WORKER), "[^/]+/[0-9a-f]{32}"),
        BEAT: _is_count(fields.get(BEAT, 0)),
        RESUMES: RESUMES not in fields or _is_count(fields[RESUMES], number - 1),
        WORKDIR: _is_count(fields.get(WORKDIR, 0), number),
        PLACE: _is_count(fields.get(PLACE, 0), number),
        DEATHS: isinstance(deaths, list)
        and [type(part) for part in deaths] == [int, list]
        and deaths[0] >= 0,
        REASON: isinstance(fields.get(REASON, ""), str),
        OVERRIDES: isinstance(fields.get(OVERRIDES, {}), dict),
        TEST_LOSS: _is_loss(fields.get(TEST_LOSS, 0)),
        "value": values is None or (len(values) == 1 and _is_loss(values[0])),
        "dict of losses": all(_is_count(epoch) and _is_loss(losses[epoch]) for epoch in losses),
        "dict of system attributes": isinstance(trial.system_attrs, dict),
        "state": trial.state != TrialState.WAITING,
    }
    for name, valid in is_valid.items():
        if not valid:
            raise UserError(
                f"trial {number} of the study was not made by a sweep (its {name} is "
                f"{fields.get(name)!r:.80}): use another study"
            )
    trial._validate()
    return trial


def _is_count(value: object, most: float = float("inf")) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_loss(value: object) -> bool:
    """Return whether a value is a number that fits into float32."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 3.5e38


def _matches(value: object, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def check_grid(study: Study, grid: _Grid) -> None:
    """Raise `UserError` if a trial of a study was drawn from another grid."""
    for trial in study.get_trials(deepcopy=False):
        if trial.system_attrs.get("search_space", grid) != grid:
            raise UserError(
                f"the study {study.study_name!r} was made for another grid or number of seeds: "
                "use another study and --workdir"
            )


def make_sampler(name: str, seed: int, grid: _Grid | None = None) -> BaseSampler:
    """Return one of `SAMPLERS`; "grid" needs the values of each parameter."""
    return cast(BaseSampler, _SeededSampler(name, seed, grid or {}))


class _SeededSampler(Guarded):
    """A sampler with a separate seed for each trial, derived from the trial's place.

    The parameters depend only on the seed and the earlier trials, not on the process that draws
    them or on how often the trial is resumed, and two workers never draw the same.
    """

    def __init__(self, name: str, seed: int, grid: _Grid) -> None:
        self._name, self._seed, self._grid = name, seed, grid
        super().__init__(self._make(0))

    def _make(self, place: int) -> BaseSampler:
        seed = (1_000_003 * self._seed + place) % 2**32
        if self._name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._name == "grid":
            return optuna.samplers.GridSampler(self._grid, seed=self._seed % 2**32)
        return optuna.samplers.RandomSampler(seed=seed)

    @convert_errors()
    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        placed = copy.copy(trial)  # GridSampler takes the point of this number.
        placed.number = trial.user_attrs.get(PLACE, trial.number)
        self._inner = self._make(placed.number)
        self._inner.before_trial(study, placed)

    def after_trial(self, *outcome: object) -> None:
        """Do nothing: GridSampler would stop Optuna's own loop, and the others do nothing."""


def make_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    """Return one of `options.PRUNERS`.

    Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
    """
    return optuna.pruners.NopPruner() if name == "none" else _Hyperband(1, num_epochs, 3)


class _Hyperband(optuna.pruners.HyperbandPruner):
    """Hyperband that keeps a trial in its bracket when another worker resumes it."""

    @convert_errors()
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return super().prune(study, trial)

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        placed = copy.copy(trial)
        placed.number = trial.user_attrs.get(PLACE, trial.number)
        return super()._get_bracket_id(study, placed)


def list_finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that are complete, pruned, or failed with a reason."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.is_finished() and not is_closed(trial)]


def list_running(study: Study) -> list[FrozenTrial]:
    """Return the running trials, including those of dead workers not yet detected."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def is_closed(trial: FrozenTrial) -> bool:
    """Return whether a trial was closed without a result, so that another one may resume it."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def get_trial_directory(directory: Path, trial: BaseTrial) -> Path:
    """Return the working directory of a trial."""
    return directory / TRIALS / f"{trial.user_attrs.get(WORKDIR, trial.number):04}"
