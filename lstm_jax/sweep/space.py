"""The search space of a sweep: a function from a trial to config overrides."""

import runpy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import optuna
from optuna.exceptions import OptunaError
from optuna.trial import BaseTrial

from lstm_jax.config import Config, change_fields
from lstm_jax.errors import UserError, run_user_code

# The number of draws to check before training, so that mistakes are reported early.
_NUM_PROBES = 20


class Space(NamedTuple):
    """The search space of a sweep. Its methods raise `UserError` for mistakes in its file."""

    name: str  # Of the file, for messages.
    # From a trial to fields by dotted name.
    get_overrides: Callable[[BaseTrial], Mapping[str, object]]

    def draw_config(self, trial: BaseTrial, experiment: Config) -> tuple[dict[str, object], Config]:
        """Return the fields that a trial changes, and the experiment with them."""
        with run_user_code("space file", self.name, OptunaError):
            overrides = dict(self.get_overrides(trial))
        try:
            return overrides, change_fields(experiment, overrides)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def check(self, experiment: Config) -> dict[str, list[object]]:
        """Check a fixed set of random draws; return the choices of each parameter."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(_NUM_PROBES):
            overrides, config = self.draw_config(study.ask(), experiment)
            if config.data != experiment.data:
                changed = ", ".join(name for name in overrides if name.startswith("data."))
                raise UserError(
                    f"{self.name}: it changes {changed}, but losses on different texts or tokens "
                    "can't be compared: use one sweep for each"
                )
        drawn = [item for trial in study.trials for item in trial.distributions.items()]
        return {name: [*getattr(values, "choices", ())] for name, values in drawn}


def load_space(path: str) -> Space:
    """Run a space file, and return its function; raise `UserError` if it fails."""
    with run_user_code("space file", path):
        return Space(path, runpy.run_path(path)["get_overrides"])


def make_seed_space(first: int, number: int) -> Space:
    """Return the space of consecutive seeds."""
    seeds = list(range(first, first + number))
    return Space("--seeds", lambda trial: {"seed": trial.suggest_categorical("seed", seeds)})
