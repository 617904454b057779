"""Test that each token of a text is measured once, whatever its length."""

import math

import numpy as np
import pytest

import models
from lstm_jax import loss as loss_lib
from lstm_jax.data.texts import hold_text
from lstm_jax.model import LanguageModel
from lstm_jax.run import messages
from lstm_jax.vocabulary import Vocabulary

MODEL = LanguageModel(11, 6, 9)
PARAMS = models.draw_params(MODEL, 0.6)


def compute_losses(ids: np.ndarray) -> np.ndarray:
    """Return the loss of each token but the first, from one pass over the text."""
    log_probs = models.compute_log_probs(MODEL, PARAMS, ids[:-1])
    losses: np.ndarray = -log_probs[np.arange(len(ids) - 1), ids[1:]]
    return losses


def make_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, length).astype(np.int32)


@pytest.mark.parametrize(
    ("length", "longest"), [(2, 10**6), (600, 10**6), (1025, 10**6), (5000, 10**6), (5000, 100)]
)
def test_each_token_is_predicted_once(
    length: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_lib, "LONGEST_IN_ONE", longest)  # Parallel streams, if it is 100.
    ids = make_ids(length)
    losses, expected = loss_lib.compute_token_losses(MODEL, PARAMS, ids), compute_losses(ids)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, atol=1e-4)  # In the order of the text.
    loss = loss_lib.compute_loss(MODEL, PARAMS, ids)
    assert loss == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize(("length", "context"), [(2, 5), (30, 1), (101, 10), (9000, 731)])
def test_windows_are_each_read_from_a_zero_carry(length: int, context: int) -> None:
    ids = make_ids(length)
    expected: list[float] = []
    for start in range(0, length - 1, context):
        expected += [*compute_losses(ids[start : start + context + 1])]
    losses = loss_lib.compute_token_losses(MODEL, PARAMS, ids, context)
    np.testing.assert_allclose(losses, expected, atol=1e-3)  # Rounding errors grow with time.
    loss = loss_lib.compute_loss(MODEL, PARAMS, ids, context)
    assert loss == pytest.approx(np.mean(expected), rel=1e-4)
    assert loss_lib.compute_token_losses(MODEL, PARAMS, ids[:1], context).shape == (0,)


def test_unknown_tokens_cost_the_bits_of_their_bytes() -> None:
    vocabulary = Vocabulary.from_text("a b a b", "words", min_count=2)
    text = "a b été b"
    assert vocabulary.encode(text).tolist() == [1, 2, 1, 2]
    # The first token is not predicted. " été" costs six bytes, and one for its end.
    expected = (3 * 1.5 / math.log(2) + 7 * 8) / (len(text) - 1)
    size = hold_text(text.encode(), "words").measure(vocabulary, vocabulary.encode(text))
    assert loss_lib.compute_bits_per_character(1.5, size) == pytest.approx(expected)
    assert messages.describe_loss(1.5, vocabulary, size) == (
        f"1.5000 nats per word, {expected:.4f} bits per character, perplexity 4.482"
    )
    # A first token that is a byte of a character does not count as this character.
    vocabulary = Vocabulary.from_text("", "bytes")
    ids = vocabulary.encode("été")
    assert hold_text("été".encode(), "bytes").measure(vocabulary, ids) == (4, 3, 0)
