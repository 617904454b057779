"""Test the advice that a run prints about its losses."""

from typing import Any

import pytest

from lstm_jax.run import advice


def make_rows(validation: list[float], train: list[float], epochs: float = 1) -> list[Any]:
    """Return the rows of a run that validates at the start, and after each of `train`."""
    rows: list[dict[str, Any]] = []
    for number, loss in enumerate(validation):
        step = 100 * number
        for part in (50, 0):
            if number:
                at = {"step": step - part, "epoch": epochs * (step - part) / 100}
                rows.append({**at, "split": "train", "loss": train[number - 1]})
        epoch = epochs * number
        rows.append({"step": step, "epoch": epoch, "split": "validation", "loss": loss})
    return rows


FALLING = [2.0, 1.8, 1.6, 1.5, 1.4, 1.3]


def test_overfitting_is_named_with_its_epoch() -> None:
    rows = make_rows([4.2, 2.0, 1.9, 1.8, 1.82, 1.85, 1.9], FALLING)
    rows.append({"step": 300, "epoch": 3.0, "split": "test", "loss": 1.7})
    assert advice.advise(rows) == (
        "The validation loss was lowest at epoch 3 of 6, while the training loss still fell: use "
        "more dropout or fewer epochs"
    )
    halves = advice.advise(make_rows([4.2, 2.0, 1.9, 1.8, 1.82, 1.85, 1.9], FALLING, epochs=0.5))
    assert halves is not None and "at epoch 1.5 of 3," in halves


def test_a_run_that_was_too_short_is_named() -> None:
    rows = make_rows([4.2, 2.2, 2.0, 1.9, 1.85, 1.8, 1.76], FALLING)
    assert advice.advise(rows) == "The validation loss was still falling at the end: train longer"


@pytest.mark.parametrize(
    ("validation", "train"),
    [
        ([4.2, 2.0, 1.9, 1.85, 1.84, 1.84, 1.839], FALLING),  # It has converged.
        ([4.2, 2.0, 1.9, 1.8, 1.801, 1.803, 1.805], FALLING),  # The rise is within the noise.
        ([4.2, 2.0, 1.9, 1.8, 1.85, 1.9, 2.0], [2.0, 1.9, 1.8, 1.9, 2.0, 2.1]),  # Both rise.
        ([4.2, 2.0, 1.5], FALLING),  # Too few validations.
        ([4.2], []),
        ([], []),
    ],
)
def test_nothing_is_said_if_nothing_is_clear(validation: list[float], train: list[float]) -> None:
    assert advice.advise(make_rows(validation, train)) is None


def test_rows_without_training_losses_are_no_overfitting() -> None:
    rows = make_rows([4.2, 2.0, 1.9, 1.8, 1.82, 1.85, 1.9], FALLING)
    assert advice.advise([row for row in rows if row["split"] != "train"]) is None


@pytest.mark.parametrize(
    ("losses", "most"),
    [([], 0), ([4.2], 0), ([4.2, 2.0, 1.9], 0), ([4.2, 1.9, 2.0, 1.9, 1.95], 3), ([4.2, 5.0], 1)],
)
def test_patience_counts_validations_without_a_lower_loss(losses: list[float], most: int) -> None:
    rows: list[Any] = [
        {"step": i, "split": "validation", "loss": loss} for i, loss in enumerate(losses)
    ]
    rows.insert(0, {"step": 0, "split": "train", "loss": 1.0})
    for patience in range(6):
        assert advice.is_out_of_patience(rows, patience) == (1 <= patience <= most)


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [
        (1.5, 1.6, None),
        (1.5, 2.31, "the test loss, 2.310 nats per token, is worse than guessing"),
        (2.31, None, "the validation loss, 2.310 nats per token, is worse than guessing"),
        (1.0, 1.71, "either the texts differ"),
        (1.71, 1.0, "either the texts differ"),
        (1.0, 1.69, None),
    ],
)
def test_suspicious_losses_give_a_warning(
    validation: float, test: float | None, expected: str | None
) -> None:
    warning = advice.find_suspicion({"validation": validation, "test": test}, 10)
    assert (warning is None) == (expected is None) and (expected or "") in (warning or "")
