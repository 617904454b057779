"""Show the progress of a sweep on standard error: a table on a terminal, lines elsewhere."""

import collections
import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Self

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from lstm_jax.errors import visible
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.storage import MAX_DEATHS

_MAX_ROWS = 12


class Table(Live):
    """A live table of the trials, with the best one and the remaining time."""

    def __init__(self, study: Study, trials: int) -> None:
        """Prepare the table of a study with `trials` to finish in total."""
        self._study, self._trials, self._shown = study, trials, Group()
        # Keep the current standard error: it is redirected while a trial trains.
        console = Console(file=sys.stderr)
        super().__init__(console=console, refresh_per_second=0.5, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.start()
        return self

    def tell(self, number: int) -> None:
        """Print a line for a trial that ended, unless the table is shown."""
        if self.is_started:
            return
        trials = study_lib.list_trials(self._study)
        ended = next((trial for trial in trials if trial.number == number), None)
        if ended is None:  # Another worker resumes it, or it was one too many.
            return
        text = f"trial {number} {describe_state(ended)}"
        if ended.value is not None:
            text += f" at {ended.value:.4f}"
        if reason := get_reason(ended):
            text += f" ({reason})"
        text = visible(f"{text}: {describe_settings(ended)}")
        text += f"; {describe_progress(trials, self._trials)}"
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def get_renderable(self) -> Group:
        """Return the table, or the last one if the study can't be read."""
        with contextlib.suppress(Exception):  # The database may be temporarily unreachable.
            trials = study_lib.list_trials(self._study)
            table = RichTable(box=None, pad_edge=False)
            for name, width in (("trial", 5), ("state", 8), ("epochs", 6), ("loss", 6)):
                table.add_column(name, no_wrap=True, min_width=width)
            table.add_column("settings")
            running = [t for t in trials if t.state == TrialState.RUNNING]
            ended = [t for t in trials if t.state.is_finished()]
            shown = [*ended, *running][-max(_MAX_ROWS, len(running)) :]
            for trial in sorted(shown, key=lambda t: t.number):
                losses = trial.intermediate_values
                loss = f"{min(losses.values()):.4f}" if losses else ""
                settings = visible(describe_settings(trial))
                table.add_row(
                    str(trial.number),
                    describe_state(trial),
                    str(max(losses, default=0)),
                    loss,
                    Text(settings, no_wrap=True, overflow="ellipsis"),
                )
            self._shown = Group(Text(describe_progress(trials, self._trials)), table)
        return self._shown


def get_reason(trial: FrozenTrial) -> str | None:
    """Return why a trial failed or diverged."""
    is_failed = trial.state == TrialState.FAIL
    default = f"{MAX_DEATHS} workers in a row have not finished it" if is_failed else None
    return trial.user_attrs.get(study_lib.REASON, default)


def describe_state(trial: FrozenTrial) -> str:
    """Return the state of a trial in one word."""
    if trial.state == TrialState.PRUNED:
        return "diverged" if study_lib.REASON in trial.user_attrs else "pruned"
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def describe_settings(trial: FrozenTrial) -> str:
    """Return the fields that a trial changes, as field=value."""
    overrides = trial.user_attrs.get(study_lib.OVERRIDES, trial.params)
    return ", ".join(
        f"{name.rpartition('.')[2]}={format_value(v)}" for name, v in overrides.items()
    )


def format_value(value: object) -> str:
    """Return a value with at most three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def find_best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the complete trial with the lowest validation loss; None if there is none."""
    complete = (trial for trial in trials if trial.state == TrialState.COMPLETE)
    return min(complete, key=lambda trial: trial.values[0], default=None)


def describe_progress(trials: Sequence[FrozenTrial], wanted: int) -> str:
    """Return the number of trials in each state, the best of them, and the remaining time."""
    counts = collections.Counter(map(describe_state, trials))
    running = counts["running"]
    ended = counts.total() - running - counts["waiting"]
    parts = [f"{ended} of {wanted} trials", *(f"{n} {name}" for name, n in counts.items())]
    if best := find_best_trial(trials):
        parts.append(f"best {best.value:.4f} (trial {best.number})")
    seconds = [t.duration.total_seconds() for t in trials if t.duration]
    if seconds and ended < wanted:
        left = sum(seconds) / len(seconds) * (wanted - ended) / max(1, running)
        hours, minutes = divmod(round(left / 60), 60)
        parts.append("about " + (f"{hours} h " if hours else "") + f"{minutes} min left")
    return ", ".join(parts)
