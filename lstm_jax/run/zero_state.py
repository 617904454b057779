"""Measure how well a model starts from a zero carry, with which every sample begins."""

from typing import NamedTuple

import numpy as np

from lstm_jax.loss import read_chunk
from lstm_jax.model import Carry, LanguageModel, Params, first_carry
from lstm_jax.vocabulary import Ids

_LENGTH = 512  # Tokens that count at each position.
_CHUNK = 64  # Tokens per call of the compiled function.


class ZeroState(NamedTuple):
    """Losses of a model that starts from a zero carry in the middle of a text, in nats per token.

    The loss at a position in the text is the mean over the tokens that follow it.
    """

    mean: float  # Over all positions.
    worst: float  # At the worst position.
    excess: float  # The largest increase over the loss with the carry of the text before.


def measure_zero_state(model: LanguageModel, params: Params, ids: Ids, positions: int) -> ZeroState:
    """Measure how well a model recovers from a zero carry at evenly spaced positions in a text.

    Training on streams rarely starts from a zero carry, and a model may fail there and not recover.
    The mean loss over a text, read once from its start, does not show this. The text has at
    least four tokens.
    """
    length = min(_LENGTH, (len(ids) - 1) // 3)
    chunk = min(_CHUNK, length)
    length -= length % chunk
    starts = np.unique(np.linspace(length, len(ids) - 1 - length, positions).astype(int))
    windows = np.stack([ids[start - length : start + length + 1] for start in starts])
    counted = np.ones((len(starts), chunk), bool)

    def read(begin: int, carry: Carry) -> tuple[np.ndarray, Carry]:
        total = np.zeros(len(starts))
        for at in range(begin, begin + length, chunk):
            part = windows[:, at : at + chunk], windows[:, at + 1 : at + chunk + 1], counted
            losses, carry = read_chunk(model, params, part, carry)
            total += np.asarray(losses).sum(axis=1, dtype=np.float64)
        return total / length, carry

    zero = first_carry(model, params, len(starts))
    cold, _ = read(length, zero)
    _, carry = read(0, zero)
    warm, _ = read(length, carry)
    return ZeroState(float(cold.mean()), float(cold.max()), float((cold - warm).max()))
