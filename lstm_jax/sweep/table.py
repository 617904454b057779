"""How far a sweep is, on standard error: a table on a terminal, lines elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from lstm_jax.errors import visible
from lstm_jax.sweep import study as study_lib

_ROWS = 12
_SECONDS = 2


class Table:
    """Shows the best trial so far, those that run, how the others ended, and the time left."""

    def __init__(self, study: Study, trials: int) -> None:
        """Takes the study and how many trials are wanted in all."""
        self._study, self._trials = study, trials
        # Now, since standard error is another while a trial trains.
        self._console = Console(file=sys.stderr)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True)
            if self._console.is_terminal
            else None
        )
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._thread = threading.Thread(target=self._refresh, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._live:
            self._thread.join()
            self._live.stop()

    def tell(self, number: int) -> None:
        """A trial has ended: a line where there is no terminal."""
        if self._live:
            return
        trials = self._study.get_trials(deepcopy=False)
        (ended,) = (trial for trial in trials if trial.number == number)
        self._console.print(
            f"{visible(describe_trial(ended))}; {describe_progress(trials, self._trials)}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )

    def _refresh(self) -> None:
        assert self._live
        while True:
            try:
                self._live.update(self._draw(), refresh=True)
            except Exception:  # A database that does not answer now is no reason to end.
                time.sleep(_SECONDS)
            if self._done.wait(_SECONDS):
                return

    def _draw(self) -> Group:
        trials = self._study.get_trials(deepcopy=False)
        table = RichTable(box=None, pad_edge=False)
        for name, width in (("trial", 5), ("state", 8), ("epochs", 6), ("loss", 6)):
            table.add_column(name, no_wrap=True, min_width=width)
        table.add_column("settings")
        shown = [t for t in trials if t.state == TrialState.RUNNING]
        ended = [t for t in trials if t.state.is_finished() and describe_state(t)]
        for trial in sorted([*shown, *ended[-(_ROWS - len(shown)) :]], key=lambda t: t.number):
            losses = trial.intermediate_values
            loss = f"{min(losses.values()):.4f}" if losses else ""
            epochs = str(max(losses)) if losses else "0"
            what = Text(visible(describe_settings(trial)), no_wrap=True, overflow="ellipsis")
            table.add_row(str(trial.number), describe_state(trial), epochs, loss, what)
        return Group(Text(describe_progress(trials, self._trials)), table)


def describe_state(trial: FrozenTrial) -> str:
    """How a trial stands, in a word; empty if another trial goes on with it."""
    reason = trial.user_attrs.get(study_lib.REASON, "")
    if trial.state == TrialState.PRUNED:
        return "diverged" if reason.startswith("diverged") else "pruned"
    if trial.state == TrialState.FAIL:
        return "failed" if reason else ""
    return trial.state.name.lower()


def describe_settings(trial: FrozenTrial) -> str:
    """What a trial changes, as field=value."""
    overrides = trial.user_attrs.get(study_lib.OVERRIDES, trial.params)
    return ", ".join(
        f"{name.rpartition('.')[2]}={format_value(v)}" for name, v in overrides.items()
    )


def format_value(value: object) -> str:
    """A value with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe_trial(trial: FrozenTrial) -> str:
    """One line for a trial that ended."""
    text = f"trial {trial.number} {describe_state(trial) or 'given back'}"
    if trial.value is not None:
        text += f" at {trial.value:.4f}"
    if reason := trial.user_attrs.get(study_lib.REASON):
        text += f" ({reason})"
    return f"{text}: {describe_settings(trial)}"


def describe_progress(trials: list[FrozenTrial], wanted: int) -> str:
    """How many trials ended how, the best of them, and the time left."""
    counts: dict[str, int] = {}
    for trial in trials:
        if name := describe_state(trial):
            counts[name] = counts.get(name, 0) + 1
    ended = sum(number for name, number in counts.items() if name != "running")
    parts = [f"{ended} of {wanted} trials", *(f"{n} {name}" for name, n in counts.items())]
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    if complete:
        best = min(complete, key=lambda t: t.values[0])
        parts.append(f"best {best.value:.4f} (trial {best.number})")
    seconds = [
        t.duration.total_seconds() for t in trials if describe_state(t) and t.duration is not None
    ]
    if seconds and ended < wanted:
        workers = max(1, counts.get("running", 0))
        left = sum(seconds) / len(seconds) * (wanted - ended) / workers
        hours, minutes = divmod(round(left / 60), 60)
        parts.append(
            f"about {hours} h {minutes} min left" if hours else f"about {minutes} min left"
        )
    return ", ".join(parts)
