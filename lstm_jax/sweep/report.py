"""Report a sweep: a line for each trial that ends, trials.jsonl and best.py."""

import json
import math
import shlex
import statistics
import sys
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.config import FIELDS, Config, change_fields, flatten
from lstm_jax.data import files
from lstm_jax.errors import make_visible
from lstm_jax.run import cell_file
from lstm_jax.sweep.study import (
    OVERRIDES,
    REASON,
    TEST_LOSS,
    get_directory,
    get_number,
    list_trials,
)

TRIALS = "trials.jsonl"
BEST = "best.py"


def write_report(study: Study, directory: Path, experiment: Config) -> str:
    """Write all results of a sweep, finished or not; return the text for the user."""
    write_trials(study, directory)
    complete = list_complete(study)
    if not complete:
        lines = ["No trial is complete."]
    elif all(set(trial.params) == {"seed"} for trial in complete):
        members = [shlex.quote(str(get_directory(directory, trial))) for trial in complete]
        lines = [
            _describe_spread("validation", [trial.values[0] for trial in complete]),
            _describe_spread("test", [trial.user_attrs.get(TEST_LOSS) for trial in complete]),
            "Measure their ensemble: python -m lstm_jax.evaluate --workdir "
            + " --workdir ".join(members)
            + cell_file.make_flag(experiment.model),
        ]
    else:
        trial = complete[0]
        best = f"trial {get_number(trial)}, validation loss {trial.value:.4f}"
        config = change_fields(experiment, trial.user_attrs[OVERRIDES])
        found, again = directory / BEST, directory / f"best-{get_number(trial):04}"
        train = f"--config {shlex.quote(str(found))} --workdir {shlex.quote(str(again))}"
        train = f"python -m lstm_jax.main {train}"
        files.write_file(found, _make_best_file(config, train, best).encode())
        trained = shlex.quote(str(get_directory(directory, trial)))
        flags = f"--workdir {trained}{cell_file.make_flag(config.model)}"
        lines = [
            f"Best of {len(list_trials(study))} trials: {best}: {describe_settings(trial)}",
            f"Train it: {train}",
            f"Generate text: python -m lstm_jax.sample {flags}",
        ]
    return "\n".join([*lines, f"All trials: {directory / TRIALS}"])


def write_trials(study: Study, directory: Path) -> None:
    """Write a line of JSON for each trial: its state, settings, losses and working directory."""
    rows = [
        {
            "trial": get_number(trial),
            "state": describe_state(trial),
            "validation_loss": trial.value,
            "test_loss": trial.user_attrs.get(TEST_LOSS),
            "losses_by_epoch": trial.intermediate_values,
            "overrides": trial.user_attrs.get(OVERRIDES, trial.params),
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            "reason": trial.user_attrs.get(REASON),
            "workdir": str(get_directory(directory, trial)),
        }
        for trial in list_trials(study)
    ]
    files.write_file(directory / TRIALS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _describe_spread(split: str, losses: list[float | None]) -> str:
    """Describe the losses of trials that differ only in the seed."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return f"{split} loss: not measured"
    deviation = statistics.stdev(known) if len(known) > 1 else math.nan
    return (
        f"{split} loss of {len(known)} seeds: mean {statistics.mean(known):.4f}, standard "
        f"deviation {deviation:.4f}, from {min(known):.4f} to {max(known):.4f}"
    )


def _make_best_file(config: Config, command: str, description: str) -> str:
    """Return the experiment file of a trial: all fields that differ from the defaults."""
    default = {field.name: field.default for field in FIELDS}
    lines = "\n".join(
        f"    config.{name} = {value!r}"
        for name, value in flatten(config)
        if value != default[name] and name != "data.sha256"
    )
    return f'''"""The best trial of a sweep: {description} nats per token."""
# {command}

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the best settings of the sweep."""
    config = config_lib.default()

{lines}
    return config
'''


def print_end(study: Study, trial: FrozenTrial, wanted: int) -> None:
    """Print the result of a trial, and the progress of a sweep of `wanted` trials."""
    loss = "" if trial.value is None else f" at {trial.value:.4f}"
    reason = f" ({trial.user_attrs[REASON]})" if REASON in trial.user_attrs else ""
    trials = list_trials(study)
    seconds = [t.duration.total_seconds() for t in trials if t.duration]
    parts = [
        f"trial {get_number(trial)} {describe_state(trial)}{loss}{reason}: "
        f"{describe_settings(trial)}; {len(seconds)} of {wanted} trials"
    ]
    if complete := list_complete(study):
        parts.append(f"best {complete[0].value:.4f} (trial {get_number(complete[0])})")
    if left := max(wanted - len(seconds), 0):
        running = 1 + sum(t.state == TrialState.RUNNING for t in trials)
        minutes = statistics.mean(seconds) * left / running / 60
        parts.append(f"about {minutes:.0f} min left")
    print(make_visible(", ".join(parts)), file=sys.stderr, flush=True)


def describe_state(trial: FrozenTrial) -> str:
    """Return the state of a trial in one word."""
    if trial.state == TrialState.PRUNED:
        return "diverged" if REASON in trial.user_attrs else "pruned"
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def describe_settings(trial: FrozenTrial) -> str:
    """Return the fields that a trial changes, as field=value, with at most three digits."""
    overrides = trial.user_attrs.get(OVERRIDES, trial.params)
    return ", ".join(
        f"{name.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in overrides.items()
    )


def list_complete(study: Study) -> list[FrozenTrial]:
    """Return the complete trials, those with the lowest validation losses first."""
    complete = [trial for trial in list_trials(study) if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: trial.values[0])
