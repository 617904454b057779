"""Load the search space of a sweep: a Python file that maps a trial to config overrides."""

import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import OptunaError
from optuna.trial import BaseTrial, FrozenTrial

from lstm_jax.config import Config, change_fields
from lstm_jax.errors import UserError, run_user_code

FUNCTION = "get_overrides"  # The function of a space file.
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

    def draw_trials(self, experiment: Config) -> list[FrozenTrial]:
        """Check a fixed set of random draws, and return them."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(_NUM_PROBES):
            overrides, config = self.draw_config(study.ask(), experiment)
            if config.data != experiment.data:
                changed = ", ".join(name for name in overrides if name.startswith("data."))
                raise UserError(
                    f"{self.name}: it changes {changed}, but losses on different texts or tokens "
                    "can't be compared: use one sweep for each"
                )
        return study.trials


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


def make_grid(draws: Iterable[FrozenTrial]) -> dict[str, list[Any]]:
    """Return the values of each parameter of draws; raise `UserError` for a continuous one."""
    grid: dict[str, list[Any]] = {}
    for name, drawn in (item for draw in draws for item in draw.distributions.items()):
        if isinstance(drawn, CategoricalDistribution):
            grid[name] = list(drawn.choices)
            continue
        low, high, step = drawn.low, drawn.high, drawn.step  # type: ignore[attr-defined]
        if step is None:
            raise UserError(
                f"a grid needs a finite number of values of {name!r}: use suggest_categorical, "
                "or a step and no log"
            )
        # Rounding may raise the last value above `high`.
        grid[name] = [min(low + i * step, high) for i in range(round((high - low) / step) + 1)]
    return grid
