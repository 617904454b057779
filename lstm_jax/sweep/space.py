"""Load the search space of a sweep: a Python file that maps a trial to config overrides."""

import itertools
import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import CategoricalChoiceType, CategoricalDistribution
from optuna.exceptions import OptunaError
from optuna.trial import BaseTrial, FrozenTrial

from lstm_jax.config import Config, change_fields
from lstm_jax.errors import UserError, one_line, run_user_code

FUNCTION = "get_overrides"  # The function of a space file.
# The number of draws to check before training, so that mistakes are reported early.
_NUM_PROBES = 20


class Space(NamedTuple):
    """The search space of a sweep. Its methods raise `UserError` for mistakes in its file."""

    name: str  # Of the file, for messages.
    # From a trial to fields by dotted name.
    get_overrides: Callable[[BaseTrial], Mapping[str, object]]

    def draw_config(self, trial: BaseTrial, experiment: Config) -> tuple[dict[str, object], Config]:
        """Return the fields that a trial changes, as in JSON, and the experiment with them."""
        with run_user_code("space file", self.name, OptunaError):
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
        try:
            return made, change_fields(experiment, made)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def draw_trials(self, experiment: Config) -> list[FrozenTrial]:
        """Check a fixed set of random draws, and return them."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(_NUM_PROBES):
            _, config = self.draw_config(study.ask(), experiment)
            before = vars(experiment.data)
            if changed := [name for name, now in vars(config.data).items() if now != before[name]]:
                raise UserError(
                    f"{self.name}: it changes data.{changed[0]}, but losses on different texts or "
                    "tokens can't be compared: use one sweep for each"
                )
        for name, drawn in itertools.chain(*(t.distributions.items() for t in study.trials)):
            choices = drawn.choices if isinstance(drawn, CategoricalDistribution) else ()
            if other := [
                value for value in choices if not isinstance(value, str | int | float | None)
            ]:
                raise UserError(
                    f"{self.name}: the parameter {name!r} has the value {other[0]!r}, and Optuna "
                    "keeps only numbers, strings, booleans and None: choose a name, and return "
                    "the field for it"
                )
        return study.trials

    def make_grid(self, draws: Sequence[FrozenTrial]) -> dict[str, list[CategoricalChoiceType]]:
        """Return the values of each parameter, from draws.

        Raise `UserError` if their number is infinite, or draws have other parameters or values.
        """
        found = {name: drawn for draw in draws for name, drawn in draw.distributions.items()}
        for name, drawn in found.items():
            if any(draw.distributions.get(name) != drawn for draw in draws):
                raise UserError(
                    f"{self.name}: a grid needs the same parameters with the same range in every "
                    f"trial, unlike {name!r}: change that, or use another --sampler"
                )
        return {name: self._list_values(name, drawn) for name, drawn in found.items()}

    def _list_values(self, name: str, distribution: Any) -> list[CategoricalChoiceType]:
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        low, high, step = distribution.low, distribution.high, distribution.step
        if step is None:
            raise UserError(
                f"{self.name}: a grid needs a finite number of values of {name!r}: use "
                "suggest_categorical, or a step and no log"
            )
        # Rounding may raise the last value above `high`.
        return [min(low + i * step, high) for i in range(round((high - low) / step) + 1)]


def load_space(path: Path) -> Space:
    """Run a space file; raise `UserError` if it fails or lacks the function."""
    if not path.is_file():
        raise UserError(f"there is no space file {path}")
    with run_user_code("space file", str(path)):
        names = runpy.run_path(str(path))
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
