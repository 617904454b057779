"""Report a sweep: a line for each trial that ends, trials.jsonl and best.py."""

import collections
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.config import FIELDS, Config, change_fields, flatten
from lstm_jax.data import files
from lstm_jax.errors import make_visible
from lstm_jax.run import cell_file
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.storage import REASON

TRIALS = "trials.jsonl"
BEST = "best.py"


def write_report(study: Study, directory: Path, experiment: Config) -> str:
    """Write all results of a sweep, finished or not; return the text for the user."""
    write_trials(study, directory)
    trials = study.get_trials(deepcopy=False)
    best = find_best_trial(trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if best is None:
        lines = ["No trial is complete."]
    elif all(set(trial.params) == {"seed"} for trial in complete):
        members = [str(study_lib.get_trial_directory(directory, trial)) for trial in complete]
        lines = _measure_spread(complete)
        if len(members) > 1:
            named = [argument for member in members for argument in ("--workdir", member)]
            command = shlex.join(["python", "-m", "lstm_jax.evaluate", *named])
            command += cell_file.make_flag(experiment.model)
            lines.append(f"Measure their ensemble: {command}")
    else:
        config = change_fields(experiment, best.user_attrs[study_lib.OVERRIDES])
        files.write_file(directory / BEST, _make_best_file(best, config, directory).encode())
        trained = str(study_lib.get_trial_directory(directory, best))
        command = shlex.join(["python", "-m", "lstm_jax.sample", "--workdir", trained])
        lines = [
            f"Best of {len(trials)} trials: trial {best.number}, validation loss "
            f"{best.value:.4f}: {make_visible(describe_settings(best))}",
            f"Train it: {_get_command(best, directory)}",
            f"Generate text: {command}{cell_file.make_flag(config.model)}",
        ]
    return "\n".join([*lines, f"All trials: {directory / TRIALS}"])


def write_trials(study: Study, directory: Path) -> None:
    """Write a line of JSON for each trial: its state, settings, losses and working directory."""
    rows = [
        {
            "trial": trial.number,
            "state": describe_state(trial),
            "validation_loss": trial.value,
            "test_loss": trial.user_attrs.get(study_lib.TEST_LOSS),
            "losses_by_epoch": trial.intermediate_values,
            "overrides": trial.user_attrs.get(study_lib.OVERRIDES, trial.params),
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            "reason": trial.user_attrs.get(REASON),
            "workdir": str(study_lib.get_trial_directory(directory, trial)),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    files.write_file(directory / TRIALS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _get_command(best: FrozenTrial, directory: Path) -> str:
    """Return the command that trains the best trial again, in a directory with its number."""
    given = "--config", directory / BEST, "--workdir", directory / f"best-{best.number:04}"
    return shlex.join(["python", "-m", "lstm_jax.main", *map(str, given)])


def _measure_spread(complete: Sequence[FrozenTrial]) -> list[str]:
    """Return lines with the spread of the losses of trials that differ only in the seed."""
    attributes = [trial.user_attrs for trial in complete]
    tests = [each[study_lib.TEST_LOSS] for each in attributes if study_lib.TEST_LOSS in each]
    spread = []
    for split, losses in (("validation", [trial.values[0] for trial in complete]), ("test", tests)):
        text = "none was measured"
        if losses:
            deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
            text = (
                f"mean {statistics.mean(losses):.4f}, standard deviation {deviation:.4f}, from "
                f"{min(losses):.4f} to {max(losses):.4f}"
            )
        spread.append(f"{split} loss of {len(losses)} seeds: {text}")
    return spread


def _make_best_file(best: FrozenTrial, config: Config, directory: Path) -> str:
    """Return the experiment file of the best trial: all fields that differ from the defaults."""
    default = {field.name: field.default for field in FIELDS}
    lines = "\n".join(
        f"    config.{name} = {value!r}"
        for name, value in flatten(config)
        if value != default[name] and name != "data.sha256"
    )
    command = _get_command(best, directory)
    return f'''"""The best trial of a sweep, trial {best.number}."""
# {command if command.isprintable() else ascii(command)}
#
# Validation loss in the sweep: {best.value:.4f} nats per token.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the best settings of the sweep."""
    config = config_lib.default()

{lines}
    return config
'''


def print_end(study: Study, number: int, wanted: int) -> None:
    """Print the result of a trial, and the progress of a sweep of `wanted` trials."""
    trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    if trial.state.is_finished():  # It is not if another worker resumes it.
        loss = "" if trial.value is None else f" at {trial.value:.4f}"
        reason = f" ({trial.user_attrs[REASON]})" if REASON in trial.user_attrs else ""
        ended = f"trial {number} {describe_state(trial)}{loss}{reason}"
        line = f"{ended}: {describe_settings(trial)}; {describe_progress(trials, wanted)}"
        print(make_visible(line), file=sys.stderr, flush=True)


def describe_state(trial: FrozenTrial) -> str:
    """Return the state of a trial in one word."""
    if trial.state == TrialState.PRUNED:
        return "diverged" if REASON in trial.user_attrs else "pruned"
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def describe_settings(trial: FrozenTrial) -> str:
    """Return the fields that a trial changes, as field=value, with at most three digits."""
    overrides = trial.user_attrs.get(study_lib.OVERRIDES, trial.params)
    return ", ".join(
        f"{name.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in overrides.items()
    )


def find_best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the complete trial with the lowest validation loss; None if there is none."""
    complete = (trial for trial in trials if trial.state == TrialState.COMPLETE)
    return min(complete, key=lambda trial: trial.values[0], default=None)


def describe_progress(trials: Sequence[FrozenTrial], wanted: int) -> str:
    """Return the number of trials in each state, the best of them, and the remaining time.

    Call it between trials: this worker counts as one more than those running.
    """
    counts = collections.Counter(map(describe_state, trials))
    running = counts["running"]
    ended = counts.total() - running - counts["waiting"]
    parts = [f"{ended} of {wanted} trials", *(f"{n} {name}" for name, n in counts.items() if n)]
    if best := find_best_trial(trials):
        parts.append(f"best {best.value:.4f} (trial {best.number})")
    seconds = [t.duration.total_seconds() for t in trials if t.duration]
    if seconds and ended < wanted:
        left = sum(seconds) / len(seconds) * (wanted - ended) / (running + 1)
        hours, minutes = divmod(round(left / 60), 60)
        parts.append("about " + (f"{hours} h " if hours else "") + f"{minutes} min left")
    return ", ".join(parts)
