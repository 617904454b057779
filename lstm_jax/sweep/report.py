"""Report a sweep: a line for each trial that ends, trials.jsonl and best.py."""

import json
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
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.study import OVERRIDES, REASON, TEST_LOSS, get_directory, get_number

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
            _describe_spread("test", [trial.user_attrs[TEST_LOSS] for trial in complete]),
            "Measure their ensemble: python -m lstm_jax.evaluate --workdir "
            + " --workdir ".join(members)
            + cell_file.make_flag(experiment.model),
        ]
    else:
        trial = complete[0]
        best = f"trial {get_number(trial)}, validation loss {trial.value:.4f}"
        config = change_fields(experiment, trial.user_attrs[OVERRIDES])
        files.write_file(directory / BEST, _make_best_file(config, best).encode())
        trained = shlex.quote(str(get_directory(directory, trial)))
        lines = [
            f"Best of {len(study_lib.list_trials(study))} trials: {best}: "
            + describe_settings(trial),
            f"Train it: python -m lstm_jax.main --config {shlex.quote(str(directory / BEST))}",
            f"Generate text: python -m lstm_jax.sample --workdir {trained}"
            + cell_file.make_flag(config.model),
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
        for trial in study_lib.list_trials(study)
    ]
    files.write_file(directory / TRIALS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _describe_spread(split: str, losses: list[float]) -> str:
    """Describe the losses of trials that differ only in the seed."""
    deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "unknown"
    return (
        f"{split} loss of {len(losses)} seeds: mean {statistics.mean(losses):.4f}, standard "
        f"deviation {deviation}, from {min(losses):.4f} to {max(losses):.4f}"
    )


def _make_best_file(config: Config, description: str) -> str:
    """Return the experiment file of a trial: all fields that differ from the defaults."""
    lines = "\n".join(
        f"    config.{name} = {value!r}"
        for name, value in flatten(config)
        if value != FIELDS[name].default and name != "data.sha256"
    )
    return f'''"""The best trial of a sweep: {description} nats per token."""

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
    ended = sum(t.state.is_finished() for t in study_lib.list_trials(study))
    message = (
        f"trial {get_number(trial)} {describe_state(trial)}{loss}{reason}: "
        f"{describe_settings(trial)}; {ended} of {wanted} trials"
    )
    if complete := list_complete(study):
        message += f", best {complete[0].value:.4f} (trial {get_number(complete[0])})"
    print(make_visible(message), file=sys.stderr, flush=True)


def describe_state(trial: FrozenTrial) -> str:
    """Return the state of a trial in one word."""
    has_failed = trial.state == TrialState.FAIL or REASON in trial.user_attrs
    return "failed" if has_failed else trial.state.name.lower()


def describe_settings(trial: FrozenTrial) -> str:
    """Return the fields that a trial changes, as field=value, with at most three digits."""
    overrides = trial.user_attrs.get(OVERRIDES, trial.params)
    return ", ".join(
        f"{name.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in overrides.items()
    )


def list_complete(study: Study) -> list[FrozenTrial]:
    """Return the complete trials, those with the lowest validation losses first."""
    trials = study_lib.list_trials(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: trial.values[0])
