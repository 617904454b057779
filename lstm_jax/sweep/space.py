"""What a sweep searches: a Python file with a function from an Optuna trial to config overrides."""

import json
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from ml_collections import ConfigDict
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial

from lstm_jax import config as config_lib
from lstm_jax.errors import UserError, one_line

FUNCTION = "get_overrides"
# Draws that a new space is tried with, so that mistakes are told before anything is trained.
_PROBES = 20


class Space(NamedTuple):
    """What trials vary.

    Attributes:
      name: of the file, for messages.
      get_overrides: from a trial to the fields that it changes, by dotted name.
    """

    name: str
    get_overrides: Callable[[Any], Mapping[str, Any]]

    def overrides(self, trial: Any) -> dict[str, Any]:
        """What a trial changes, as JSON holds it: lists for tuples.

        Raises:
          UserError: for whatever goes wrong in the file.
        """
        try:
            overrides = self.get_overrides(trial)
        except SystemExit as error:
            raise _exited(self.name, error) from None
        except optuna.TrialPruned:
            raise UserError(
                f"{self.name}: it raised TrialPruned: return fields for every trial, drawn so that "
                "they go together"
            ) from None
        except (optuna.exceptions.OptunaError, UserError):
            raise
        except Exception as error:
            raise UserError(f"{_where(self.name, error)}: {one_line(error)}") from None
        if not isinstance(overrides, Mapping):
            raise UserError(
                f"{self.name}: {FUNCTION}(trial) returned {type(overrides).__name__}, not a dict "
                "of fields such as {'optimizer.learning_rate': 1e-3}"
            )
        try:
            made: dict[str, Any] = json.loads(json.dumps(dict(overrides)))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self.name}: a field must be a number, a string, a boolean or a list of them "
                f"({one_line(error)})"
            ) from None
        return made

    def replay(self, trial: FrozenTrial) -> dict[str, Any]:
        """What this space makes of the parameters of a trial; those it lacks are given some value.

        Raises:
          UserError: if this space can't have drawn them.
        """
        replayed = _Replayed(self.name, trial.params, trial.distributions)
        overrides = self.overrides(replayed)
        for name in trial.params.keys() - replayed.distributions.keys():
            raise _not_drawn(self.name, name, trial.params[name])
        return overrides

    def apply(self, experiment: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
        """The complete config with some fields changed.

        Raises:
          UserError: for an unknown field, or a value that it can't have.
        """
        try:
            return change_fields(experiment, overrides)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def check(self, experiment: ConfigDict) -> tuple[list[ConfigDict], list[str]]:
        """The configs of some draws, always the same, and the names of all parameters drawn.

        Raises:
          UserError: for the first draw that makes no config.
        """
        sampler = optuna.samplers.RandomSampler(seed=0)
        study = optuna.create_study(sampler=sampler)
        configs = [self.apply(experiment, self.overrides(study.ask())) for _ in range(_PROBES)]
        return configs, sorted({name for trial in study.trials for name in trial.params})

    def grid(self) -> dict[str, list[Any]]:
        """The values of each parameter.

        Raises:
          UserError: if one has no finite number of them.
        """
        trial = _Replayed(self.name, {}, {})
        self.overrides(trial)
        return {name: self._values(name, drawn) for name, drawn in trial.distributions.items()}

    def _values(self, name: str, drawn: BaseDistribution) -> list[Any]:
        if isinstance(drawn, optuna.distributions.CategoricalDistribution):
            return list(drawn.choices)
        assert isinstance(
            drawn, optuna.distributions.IntDistribution | optuna.distributions.FloatDistribution
        )
        if drawn.step is None or drawn.log:
            raise UserError(
                f"{self.name}: a grid needs a finite number of values of {name!r}: give it a step, "
                "or suggest_categorical"
            )
        number = round((drawn.high - drawn.low) / drawn.step)
        # A sum of floats may come out above the highest value.
        return [min(drawn.low + i * drawn.step, drawn.high) for i in range(number + 1)]


class _Replayed(optuna.trial.FixedTrial):
    """Notes from what parameters are drawn, and gives known values, or the first of each."""

    def __init__(
        self, space: str, params: dict[str, Any], drawn: Mapping[str, BaseDistribution]
    ) -> None:
        super().__init__(params)
        self._space, self._drawn = space, drawn

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        self._distributions[name] = distribution
        if name in self._params:
            try:
                check_distribution_compatibility(self._drawn[name], distribution)
                internal = distribution.to_internal_repr(self._params[name])
                if distribution._contains(internal):
                    return distribution.to_external_repr(internal)
            except (ValueError, TypeError):
                pass
            raise _not_drawn(self._space, name, self._params[name])
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            return distribution.choices[0]
        return distribution.low  # type: ignore[attr-defined]


def _not_drawn(space: str, name: str, value: Any) -> UserError:
    return UserError(
        f"{space}: it does not draw {name!r:.80} = {value!r:.80}, which a trial of the study has: "
        "name another --workdir"
    )


def _exited(name: str, error: SystemExit) -> BaseException:
    """What is to be raised where a space file called sys.exit; a signal handler's is its own."""
    if type(error) is not SystemExit:
        return error
    return UserError(f"space file {name}: it calls sys.exit({error.code!r:.80})")


def load_space(path: Path) -> Space:
    """The space in a file.

    Raises:
      UserError: if it can't be read or run, or lacks the function.
    """
    if not path.is_file():
        raise UserError(f"there is no space file {path}")
    sys.path.insert(0, str(path.parent))
    try:
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        raise UserError(f"space file {error.filename}, line {error.lineno}: {error.msg}") from None
    except SystemExit as error:
        raise _exited(str(path), error) from None
    except Exception as error:
        raise UserError(f"{_where(str(path), error)}: {one_line(error)}") from None
    finally:
        sys.path.remove(str(path.parent))
    if not callable(names.get(FUNCTION)):
        raise UserError(
            f"{path} has no function {FUNCTION}(trial): it is to return the fields that a trial "
            "changes, as experiments/sweeps/quick.py does"
        )
    return Space(str(path), names[FUNCTION])


def make_seed_space(first: int, number: int) -> Space:
    """The same experiment with one seed after the other."""

    def get_overrides(trial: Any) -> dict[str, Any]:
        return {"seed": trial.suggest_int("seed", first, first + number - 1, step=1)}

    return Space("--seeds", get_overrides)


def change_fields(experiment: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A complete config with some fields, by dotted name, changed.

    Raises:
      UserError: for an unknown field, or a value that it can't have.
    """
    fields = experiment.to_dict()
    for field, value in overrides.items():
        if message := config_lib.describe_unknown_field(str(field)):
            raise UserError(message)
        *parents, name = field.split(".")
        part = fields
        for parent in parents:
            part = part[parent]
        part[name] = value
    return config_lib.complete_config(fields)


def _where(name: str, error: Exception) -> str:
    """The space file, and the line of it in which an exception was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).name == Path(name).name]
    return f"space file {name}, line {(own or lines)[-1]}"
