"""Describe the trials of a sweep, and print a line for each that ends."""

import collections
import sys
from collections.abc import Iterable, Sequence

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.errors import visible
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.storage import REASON


def print_end(study: Study, number: int, wanted: int) -> None:
    """Print the result of a trial, and the progress of a sweep of `wanted` trials."""
    trials = study_lib.list_trials(study)
    for trial in trials:  # It is not there if another worker resumes it.
        if trial.number == number:
            loss = "" if trial.value is None else f" at {trial.value:.4f}"
            reason = f" ({trial.user_attrs[REASON]})" if REASON in trial.user_attrs else ""
            ended = f"trial {number} {describe_state(trial)}{loss}{reason}"
            line = f"{ended}: {describe_settings(trial)}; {describe_progress(trials, wanted)}"
            print(visible(line), file=sys.stderr, flush=True)


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

    The worker that calls this runs none at the moment.
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
