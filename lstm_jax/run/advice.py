"""Read the losses of a run: has it stopped improving, what to change next, what is suspicious."""

import math
from collections.abc import Mapping, Sequence

from lstm_jax.run.metrics import Row

# Fractions of a loss. Runs that differ only in their seed differ by a few thousandths.
_RISE, _FALL = 0.005, 0.01
_FAR = 0.7  # Losses of one model, in nats per token, that differ by more are suspicious.


def is_out_of_patience(rows: Sequence[Row], patience: int) -> bool:
    """Return whether the last `patience` > 0 validations did not improve on those before.

    A run that was stopped or killed and has resumed has the same rows as one that was not, so both
    end at the same step.
    """
    losses = [row["loss"] for row in rows if row["split"] == "validation"]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def advise(rows: Sequence[Row]) -> str | None:
    """Return a sentence about the losses of a finished run, or None if nothing is clear.

    - Overfitting: the last validation loss is more than 0.5 % above the lowest, and the training
      loss fell in between. It is averaged since the validation before each of the two.
    - Too short: the last validation loss is the lowest, and at least 1 % below that after four
      fifths of the run.

    Nothing is clear before the third validation, not counting that of the untrained model.
    """
    validations = [row for row in rows if row["split"] == "validation" and row["step"]]
    if len(validations) < 3:
        return None
    best, last = min(validations, key=lambda row: float(row["loss"])), validations[-1]
    if last["loss"] > best["loss"] * (1 + _RISE):
        before, after = (_average_training_loss(rows, row["step"]) for row in (best, last))
        if before is not None and after is not None and after < before:
            return (
                f"The validation loss was lowest at epoch {round(best['epoch'], 4):g} of "
                f"{round(last['epoch'], 4):g}, while the training loss still fell: use more "
                "dropout or fewer epochs"
            )
    earlier = [row for row in validations if row["step"] <= 0.8 * last["step"]]
    if best is last and earlier and last["loss"] <= earlier[-1]["loss"] * (1 - _FALL):
        return "The validation loss was still falling at the end: train longer"
    return None


def _average_training_loss(rows: Sequence[Row], step: int) -> float | None:
    """Return the mean training loss between the validation at a step and the one before it."""
    earlier = [row["step"] for row in rows if row["split"] == "validation" and row["step"] < step]
    steps = range(max(earlier, default=0) + 1, step + 1)
    losses = [row["loss"] for row in rows if row["split"] == "train" and row["step"] in steps]
    return sum(losses) / len(losses) if losses else None


def find_suspicion(losses: Mapping[str, float | None], vocabulary_size: int) -> str | None:
    """Return a warning if the losses of a trained model, by split, are suspicious, else None."""
    guessing = math.log(vocabulary_size)
    for name, loss in losses.items():
        if loss is not None and loss > guessing:
            return (
                f"the {name} loss, {loss:.3f} nats per token, is worse than guessing among the "
                f"{vocabulary_size:,} tokens ({guessing:.3f})"
            )
    validation, test = losses.get("validation"), losses.get("test")
    if validation is not None and test is not None and abs(test - validation) > _FAR:
        return (
            f"the test loss, {test:.3f} nats per token, is far from the validation loss, "
            f"{validation:.3f}: either the texts differ, or the model fails on one of them"
        )
    return None
