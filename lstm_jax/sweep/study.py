"""The Optuna study that the workers of a sweep share: attributes, checks, sampler and pruner.

A study may come from somebody else. Its trials are checked as they are read (`check_trial`), and
their parameters must be ones that the user's own space draws (`check_space`).
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
from ml_collections import ConfigDict
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lstm_jax import config as config_lib
from lstm_jax.errors import UserError
from lstm_jax.sweep.space import Space
from lstm_jax.sweep.storage import Guarded, convert_errors, open_storage

# Optuna's CMA-ES is missing: it unpickles its state from the study, which can run any code.
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("hyperband", "none")

# In the directory of a sweep: the study, unless --study names another, and the trials.
DATABASE = "study.db"
TRIALS = "trials"

# Attributes of a trial. Only the process that works on a trial writes them.
WORKER = "worker"  # host/name/ticket, where the ticket is unique.
BEAT = "beat"  # A counter that the worker increments.
RESUMES = "resumes"  # The number of the trial that this one resumes.
WORKDIR = "workdir"  # The number that names its working directory.
PLACE = "place"  # How many other trials were started before it; the sampler's seed depends on it.
ORIGIN = "origin"  # Identifies its working directory among those of other studies.
DEATHS = "deaths"  # How many workers died since it last made progress, and that progress.
GIVEN_BACK = "given_back"  # Its worker closed it on purpose.
DROPPED = "dropped"  # It was closed because it was one too many.
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
    experiment: ConfigDict,
    parameters: Sequence[str],
    sampler: BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> Study:
    """Open the study of a sweep; make it if it does not exist.

    Args:
      directory: of the sweep.
      location: the URL of a database, or journal:FILE. None: an SQLite file in `directory`.
      name: of the study.
      experiment: the config that trials change.
      parameters: the names of all parameters that trials draw.
      sampler: from `make_sampler`.
      pruner: from `make_pruner`.

    Raises:
      UserError: if it can't be reached or written, or was made for another experiment or space.
    """
    study = optuna.create_study(
        storage=open_storage(directory / DATABASE, location, check_trial),
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
        raise UserError(f"the study {name!r} exists, but no sweep made it: choose another --name")
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


def check_space(study: Study, space: Space) -> None:
    """Raise `UserError` unless a space gives each trial the overrides that the study holds."""
    for trial in study.get_trials(deepcopy=False):
        overrides = space.replay(trial)
        if trial.user_attrs.get(OVERRIDES, overrides) != overrides:
            raise UserError(
                f"{space.name}: its fields for the parameters of trial {trial.number} differ from "
                "those in the study: name another --workdir"
            )


def check_trial(trial: FrozenTrial) -> None:
    """Raise `UserError` for a trial with values that no sweep writes."""
    attributes, losses, number = trial.user_attrs, trial.intermediate_values, trial.number
    deaths = attributes.get(DEATHS, [0, []])
    is_valid = {
        ORIGIN: _matches(attributes.get(ORIGIN), "[0-9a-f]{32}"),
        WORKER: _matches(attributes.get(WORKER), "[^/]+/[0-9a-f]{32}/[0-9a-f]{32}"),
        BEAT: _is_count(attributes.get(BEAT, 0)),
        RESUMES: RESUMES not in attributes or _is_count(attributes[RESUMES], number - 1),
        WORKDIR: _is_count(attributes.get(WORKDIR, 0), number),
        PLACE: _is_count(attributes.get(PLACE, 0), number),
        DEATHS: isinstance(deaths, list)
        and [type(part) for part in deaths] == [int, list]
        and deaths[0] >= 0,
        REASON: isinstance(attributes.get(REASON, ""), str),
        OVERRIDES: isinstance(attributes.get(OVERRIDES, {}), dict),
        TEST_LOSS: _is_loss(attributes.get(TEST_LOSS, 0)),
    }
    wrong = [f"{n} is {attributes.get(n)!r:.80}" for n, valid in is_valid.items() if not valid]
    if not all(_is_count(epoch) and _is_loss(loss) for epoch, loss in losses.items()):
        wrong.append(f"losses are {losses!r:.80}")
    if trial.values is not None and not (len(trial.values) == 1 and _is_loss(trial.values[0])):
        wrong.append(f"values are {trial.values!r:.80}")
    if trial.state == TrialState.WAITING:
        wrong.append("state is WAITING")
    if not isinstance(trial.system_attrs, dict):
        wrong.append(f"system attributes are {trial.system_attrs!r:.80}")
    if wrong:
        raise UserError(
            f"trial {number} of the study was not made by a sweep (its {wrong[0]}): name another "
            "study"
        )
    trial._validate()


def _is_count(value: Any, most: float = float("inf")) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_loss(value: Any) -> bool:
    """Return whether it is a number that fits into float32."""
    return type(value) in (int, float) and abs(value) < 3.5e38


def _matches(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def make_sampler(name: str, seed: int, grid: Mapping[str, list[Any]] | None = None) -> BaseSampler:
    """Return one of `SAMPLERS`; "grid" needs the values of each parameter."""
    return cast(BaseSampler, _SeededSampler(name, seed, grid))


class _SeededSampler(Guarded):
    """A sampler with a new seed for each trial, which depends on the trial's place.

    So the parameters follow from the seed and the trials before, whichever process draws them and
    however often the trial is resumed, and two workers never draw the same.
    """

    def __init__(self, name: str, seed: int, grid: Mapping[str, list[Any]] | None) -> None:
        self._name, self._seed, self._grid = name, seed, grid
        super().__init__(self._make(0))

    def _make(self, place: int) -> BaseSampler:
        seed = (1_000_003 * self._seed + place) % 2**32
        if self._name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if self._name == "grid":
            return optuna.samplers.GridSampler(self._grid or {}, seed=self._seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = self._make(trial.user_attrs.get(PLACE, trial.number))
        with convert_errors():
            self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, *outcome: Any) -> None:
        if self._name != "grid":  # The grid's would only stop Optuna's own loop.
            with convert_errors():
                self._inner.after_trial(study, trial, *outcome)


def make_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    """Return one of `PRUNERS`.

    Hyperband (Li et al. 2018) counts epochs and runs successive halving in each bracket.
    """
    return optuna.pruners.NopPruner() if name == "none" else _Hyperband(1, num_epochs, 3)


class _Hyperband(optuna.pruners.HyperbandPruner):
    """Hyperband that keeps a trial in its bracket when another worker resumes it."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        with convert_errors():
            return super().prune(study, trial)

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        first = copy.copy(trial)
        first.number = trial.user_attrs.get(PLACE, trial.number)
        return super()._get_bracket_id(study, first)


def list_finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that are complete, pruned, or failed for a reason."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.is_finished() and not is_closed(trial)]


def list_running(study: Study) -> list[FrozenTrial]:
    """Return the trials that a worker is working on, dead workers not yet noticed included."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def is_closed(trial: FrozenTrial) -> bool:
    """Return whether a trial was closed without a result, so that another may resume it."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def get_trial_directory(directory: Path, trial: FrozenTrial) -> Path:
    """Return the working directory of a trial."""
    return directory / TRIALS / f"{trial.user_attrs.get(WORKDIR, trial.number):04}"
