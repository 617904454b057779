"""Read the losses of a run: when it has stopped improving, and what to change in the next run."""

from collections.abc import Mapping, Sequence
from typing import Any

_Rows = Sequence[Mapping[str, Any]]  # Those of metrics.jsonl.

# Fractions of a loss. Runs that differ only in their seed differ by a few thousandths.
_RISE, _FALL = 0.005, 0.01


def is_out_of_patience(rows: _Rows, patience: int) -> bool:
    """Return whether the last `patience` validations, not 0, did not improve on those before.

    The rows of a run that was stopped or killed and has resumed are those of one that never was, so
    both end at the same step.
    """
    losses = [row["loss"] for row in rows if row["split"] == "validation"]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def advise(rows: _Rows) -> str | None:
    """Return a sentence about the losses of a finished run, or None if nothing is clear.

    - Overfitting: the last validation loss is at least 0.5 % above the lowest, and the training
      loss fell in between. It is averaged since the validation before each of the two.
    - Too short: the last validation loss is the lowest, and at least 1 % below that after four
      fifths of the run.

    Nothing is clear before the third validation, without that of the untrained model.
    """
    validations = [row for row in rows if row["split"] == "validation" and row["step"]]
    if len(validations) < 3:
        return None
    best, last = min(validations, key=lambda row: float(row["loss"])), validations[-1]
    if last["loss"] >= best["loss"] * (1 + _RISE):
        before, after = (_average_training_loss(rows, row["step"]) for row in (best, last))
        if before is not None and after is not None and after < before:
            return (
                f"The validation loss was lowest at epoch {best['epoch']:.3g} of "
                f"{last['epoch']:.3g}, while the training loss still fell: use more dropout or "
                "fewer epochs"
            )
    earlier = [row for row in validations if row["step"] <= 0.8 * last["step"]]
    if best is last and earlier and last["loss"] <= earlier[-1]["loss"] * (1 - _FALL):
        return "The validation loss was still falling at the end: train longer"
    return None


def _average_training_loss(rows: _Rows, step: int) -> float | None:
    """Return the mean training loss between the validation at a step and the one before it."""
    start = max(
        (row["step"] for row in rows if row["split"] == "validation" and row["step"] < step),
        default=0,
    )
    losses = [
        row["loss"] for row in rows if row["split"] == "train" and start < row["step"] <= step
    ]
    return sum(losses) / len(losses) if losses else None
