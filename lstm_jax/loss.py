"""The loss of a model on a text, and figures derived from it."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import model as model_lib
from lstm_jax.vocabulary import Ids, Text, Vocabulary

# Tokens of a text that one call of the compiled function reads.
_CHUNK = 1024
# A longer text is read as so many streams side by side, by one call so many tokens of each.
LONGEST_IN_ONE = 2**20
_STREAMS, _STREAMS_CHUNK = 64, 64
# Tokens that a stream reads uncounted before its own, which end the stream before it.
_WARM_UP = 1024

# Tokens that are read from each place of `measure_zero_state`, and before it; and places of a command.
_PLACE_LENGTH = 512
PLACES = 256
# Nats per token that losses of one model hardly ever differ by.
_FAR = 0.7

# Softmax temperatures among which the best is looked for.
_TEMPERATURES = np.linspace(0.7, 1.5, 81)


@functools.partial(jax.jit, static_argnames="model")
def read_chunk(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    carry: model_lib.Carry,
    temperatures: jax.Array,
) -> tuple[jax.Array, model_lib.Carry]:
    """Summed losses (nats) of the `counted` targets at each temperature, and the carry.

    The arrays are [batch, time].
    """
    logits, carry = model_lib.apply(model, params, inputs, carry)

    def summed(temperature: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits / temperature, targets)
        return jnp.sum(losses, where=counted)

    return jax.lax.map(summed, temperatures), carry


def compute_losses(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    ids: Ids,
    temperatures: np.ndarray,
) -> np.ndarray:
    """`compute_loss` with the logits divided by each of the temperatures, from one reading."""
    carry = model.initial_carry(count_streams(ids))
    total = np.zeros(len(temperatures))
    for inputs, targets, counted in iterate_chunks(ids):
        losses, carry = read_chunk(
            model,
            params,
            inputs,
            targets,
            counted,
            carry,
            jnp.asarray(temperatures, jnp.float32),
        )
        total += np.asarray(losses, np.float64)
    return total / (len(ids) - 1)


def count_streams(ids: Ids) -> int:
    """How many parts of a text are read side by side: one unless it is very long."""
    return 1 if len(ids) <= LONGEST_IN_ONE else _STREAMS


def iterate_chunks(ids: Ids) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs, targets and which of them count, [streams, time] each, through a text.

    The last chunks are filled up, uncounted, so that one compiled function serves all.
    """
    number = count_streams(ids)
    chunk, warm_up = (_CHUNK, 0) if number == 1 else (_STREAMS_CHUNK, _WARM_UP)
    # Stream s predicts the targets from bounds[s] to bounds[s + 1].
    bounds = (len(ids) - 1) * np.arange(number + 1) // number
    # All but the first, which has nothing before it, begin so much earlier than their own targets.
    begins = np.maximum(bounds[:-1] - warm_up, 0)
    for start in range(0, int((bounds[1:] - begins).max()), chunk):
        windows = np.zeros((number, chunk + 1), np.int32)
        for window, begin, end in zip(windows, begins + start, bounds[1:], strict=True):
            read = ids[begin : max(begin, min(begin + chunk, end) + 1)]
            window[: len(read)] = read
        places = begins[:, None] + start + np.arange(chunk)
        counted = (places >= bounds[:-1, None]) & (places < bounds[1:, None])
        yield windows[:, :-1], windows[:, 1:], counted


def compute_loss(model: model_lib.LanguageModel, params: model_lib.Params, ids: Ids) -> float:
    """The loss over a text read from its start to its end, in nats per token.

    The carry is handed on all the way, so every token is predicted from the whole text before it.
    Every token but the first, which nothing comes before, is predicted once.

    A text of more than `LONGEST_IN_ONE` tokens is read as 64 streams side by side, each with the
    1,024 tokens before it read first: so many or more every token is predicted from.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, int32 [n], n at least 2.
    """
    return float(compute_losses(model, params, ids, np.ones(1))[0])


def fit_temperature(model: model_lib.LanguageModel, params: model_lib.Params, ids: Ids) -> float:
    """The softmax temperature, to a hundredth, at which the loss over a text is least."""
    losses = compute_losses(model, params, ids, _TEMPERATURES)
    return float(_TEMPERATURES[losses.argmin()])


class ZeroState(NamedTuple):
    """Losses of a model that begins to read in the middle of a text, in nats per token.

    Each is the mean over the tokens that follow a place of the text, read from a zero carry.

    Attributes:
      mean: over all places.
      worst: the greatest.
      excess: by how much the loss is greater than that of the same tokens read with as many before
        them, at the place where that is most.
    """

    mean: float
    worst: float
    excess: float

    def describe(self, name: str) -> str:
        """Return it in words, for a split of this name."""
        return (
            f"From a zero state within the {name} text: {self.mean:.4f} nats per token, "
            f"{self.worst:.4f} at the worst place; at most {self.excess:+.4f} against reading what "
            "stands before"
        )


def measure_zero_state(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: Ids, places: int
) -> ZeroState:
    """Measure how well a model recovers from the zero carry, with which every sample begins.

    Training on streams hardly ever sees that state, and a model may end up in a state that nothing
    leads out of. The mean loss over a text, read once from its start, does not show it.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, int32 [n], n at least 4.
      places: how many, evenly spread over the text.
    """
    length = min(_PLACE_LENGTH, (len(ids) - 1) // 3)
    chunk = min(_STREAMS_CHUNK, length)
    length -= length % chunk
    starts = np.unique(np.linspace(length, len(ids) - 1 - length, places).astype(int))
    windows = np.stack([ids[start - length : start + length + 1] for start in starts])

    def read(begin: int, carry: model_lib.Carry) -> tuple[np.ndarray, model_lib.Carry]:
        total = np.zeros(len(starts))
        for at in range(begin, begin + length, chunk):
            part = windows[:, at : at + chunk + 1]
            losses, carry = _read_rows(model, params, part[:, :-1], part[:, 1:], carry)
            total += np.asarray(losses, np.float64)
        return total / length, carry

    zero = model.initial_carry(len(starts))
    cold, _ = read(length, zero)
    _, carry = read(0, zero)
    warm, _ = read(length, carry)
    return ZeroState(float(cold.mean()), float(cold.max()), float((cold - warm).max()))


@functools.partial(jax.jit, static_argnames="model")
def _read_rows(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    inputs: jax.Array,
    targets: jax.Array,
    carry: model_lib.Carry,
) -> tuple[jax.Array, model_lib.Carry]:
    """Summed losses (nats) of the targets [batch, time] of each row, and the carry."""
    logits, carry = model_lib.apply(model, params, inputs, carry)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.sum(axis=1), carry


def find_suspicion(
    losses: Mapping[str, float], vocabulary_size: int, zero: ZeroState | None = None
) -> str | None:
    """Return what is odd about the losses of a trained model, None if nothing is.

    Args:
      losses: nats per token, by split; those of validation and test are of one model.
      vocabulary_size: of the model.
      zero: from `measure_zero_state`.
    """
    guessing = math.log(vocabulary_size)
    for name, loss in losses.items():
        if loss > guessing:
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
    if zero is not None and zero.excess > _FAR:
        return (
            f"from a zero state the model loses up to {zero.excess:.3f} nats per token more than "
            "with what stands before: raise batches.reset_probability"
        )
    return None


def compute_perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def compute_bits_per_character(
    loss: float, vocabulary: Vocabulary, tokens: int, *parts: Text
) -> float:
    """What a loss costs for each Unicode character, so that units of any kind can be compared.

    A unit that the vocabulary lacks was predicted as [UNK] only: it is spelled out besides, with
    eight bits for each byte of its UTF-8 and for an end mark.

    Args:
      loss: nats per token, as `compute_loss` gives it.
      vocabulary: what the text was encoded by.
      tokens: how many were predicted.
      parts: what the loss was measured on, one after the other, with two tokens at the least.
    """
    costs = [part.costs(vocabulary, first=i > 0) for i, part in enumerate(parts)]
    bits = loss / math.log(2) * tokens + 8 * sum(cost.unknown_bytes for cost in costs)
    return bits / sum(cost.characters for cost in costs)


def describe_loss(loss: float, vocabulary: Vocabulary, text: Text) -> str:
    """A loss on `text` in nats and bits per unit, as a perplexity, and in bits per character."""
    name = vocabulary.token_name
    description = (
        f"{loss:.4f} nats per {name}, {loss / math.log(2):.4f} bits per {name}, "
        f"perplexity {compute_perplexity(loss):.3f}"
    )
    if name != "character":
        bits = compute_bits_per_character(loss, vocabulary, len(text.encode(vocabulary)) - 1, text)
        description += f", {bits:.4f} bits per character"
    return description
