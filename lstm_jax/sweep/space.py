"""Load the search space of a sweep: a Python file that maps a trial to config overrides."""

import contextlib
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalChoiceType, CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import BaseTrial, FrozenTrial

from lstm_jax.config import Config, change_fields
from lstm_jax.errors import UserError, one_line, raise_user_error
from lstm_jax.sweep.options import FUNCTION

# The number of draws to check before training, so that mistakes are reported early.
_NUM_PROBES = 20


class Space(NamedTuple):
    """The search space of a sweep. Its methods raise `UserError` for mistakes in its file."""

    name: str  # Of the file, for messages.
    # From a trial to fields by dotted name.
    get_overrides: Callable[[BaseTrial], Mapping[str, object]]

    def overrides(self, trial: BaseTrial) -> dict[str, object]:
        """Return the fields that a trial changes, with lists for tuples, as in JSON."""
        with raise_user_error("space file", self.name, UpdateFinishedTrialError):
            try:
                overrides = self.get_overrides(trial)
            except optuna.TrialPruned:
                raise UserError(
                    f"{self.name}: {FUNCTION}(trial) raised TrialPruned: return valid fields for "
                    "every trial"
                ) from None
        if not isinstance(overrides, Mapping):
            raise UserError(
                f"{self.name}: {FUNCTION}(trial) returned {type(overrides).__name__}, not a dict "
                "of fields such as {'optimizer.learning_rate': 1e-3}"
            )
        try:
            made: dict[str, object] = json.loads(json.dumps(dict(overrides)))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self.name}: a field must be a number, a string, a boolean or a list of them "
                f"({one_line(error)})"
            ) from None
        return made

    def replay(self, trial: FrozenTrial) -> dict[str, object]:
        """Return the overrides for the parameters of a trial; missing ones get any value.

        Raise `UserError` if this space can't have drawn them.
        """
        replayed = _ReplayedTrial(self.name, trial.params, trial.distributions)
        overrides = self.overrides(replayed)
        for name in trial.params.keys() - replayed.distributions.keys():
            raise replayed.not_drawn(name)
        return overrides

    def apply(self, experiment: Config, overrides: Mapping[str, object]) -> Config:
        """Call `change_fields`; name the space file in its errors."""
        try:
            return change_fields(experiment, overrides)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def check(self, experiment: Config) -> tuple[list[Config], list[str]]:
        """Return the configs of a fixed set of random draws, and the names of all parameters."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        configs = [self.apply(experiment, self.overrides(study.ask())) for _ in range(_NUM_PROBES)]
        return configs, sorted({name for trial in study.trials for name in trial.params})

    def grid(self) -> dict[str, list[CategoricalChoiceType]]:
        """Return the values of each parameter; raise `UserError` if their number is infinite."""
        trial = _ReplayedTrial(self.name, {}, {})
        self.overrides(trial)
        return {name: self._list_values(name, drawn) for name, drawn in trial.distributions.items()}

    def _list_values(self, name: str, distribution: Any) -> list[CategoricalChoiceType]:
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        low, high, step = distribution.low, distribution.high, distribution.step
        if step is None or distribution.log:
            raise UserError(
                f"{self.name}: a grid needs a finite number of values of {name!r}: give it a step, "
                "or suggest_categorical"
            )
        # Rounding may raise the last value above `high`.
        return [min(low + i * step, high) for i in range(round((high - low) / step) + 1)]


class _ReplayedTrial(optuna.trial.FixedTrial):
    """A trial with known parameters; all others get their first value."""

    def __init__(
        self, space: str, params: dict[str, object], drawn: Mapping[str, BaseDistribution]
    ) -> None:
        super().__init__(params)
        self._space, self._drawn = space, drawn

    def _suggest(self, name: str, distribution: Any) -> CategoricalChoiceType:
        self._distributions[name] = distribution
        if name not in self._params:
            is_choice = isinstance(distribution, CategoricalDistribution)
            return distribution.choices[0] if is_choice else distribution.low
        with contextlib.suppress(ValueError, TypeError):
            optuna.distributions.check_distribution_compatibility(self._drawn[name], distribution)
            internal = distribution.to_internal_repr(self._params[name])
            if distribution._contains(internal):
                return distribution.to_external_repr(internal)
        raise self.not_drawn(name)

    def not_drawn(self, name: str) -> UserError:
        return UserError(
            f"{self._space} does not draw {name!r:.80} = {self._params[name]!r:.80}, which a "
            "trial of the study has: use another --workdir"
        )


def load_space(path: Path) -> Space:
    """Run a space file; raise `UserError` if it fails or lacks the function."""
    if not path.is_file():
        raise UserError(f"there is no space file {path}")
    sys.path.insert(0, str(path.parent))
    try:
        with raise_user_error("space file", str(path)):
            names = runpy.run_path(str(path))
    finally:
        sys.path.remove(str(path.parent))
    if not callable(names.get(FUNCTION)):
        raise UserError(
            f"{path} has no function {FUNCTION}(trial): it must return the fields that a trial "
            "changes, as in experiments/sweeps/quick.py"
        )
    return Space(str(path), names[FUNCTION])


def make_seed_space(first: int, number: int) -> Space:
    """Return the space of consecutive seeds."""
    last = first + number - 1
    return Space("--seeds", lambda trial: {"seed": trial.suggest_int("seed", first, last)})
