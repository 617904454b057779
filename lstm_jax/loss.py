"""Compute the loss of a model, or of an `Ensemble`, on a text, and measures derived from it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PyTree, Shaped

from lstm_jax.model import Carry, LanguageModel, Params, first_carry
from lstm_jax.vocabulary import Ids, TextSize

_CHUNK = 1024  # Tokens per call of the compiled function.
# A longer text is read as parallel streams, a chunk of each at a time. For the validation split of
# Tiny Shakespeare and quick.py's model that is 2 to 8 times as fast, depending on the processor.
# It changes the loss by at most 2e-5 nats, as rounding to bfloat16 does.
LONGEST_IN_ONE = 2**14
_STREAMS, _STREAMS_CHUNK = 64, 64
_PRECEDING = 512  # Tokens before its start that each stream reads first, uncounted.

# Inputs and targets, and which of the targets count.
Chunk = tuple[Integer[Any, "batch time"], Integer[Any, "batch time"], Bool[Any, "batch time"]]
Reader = Callable[..., tuple[PyTree[Shaped[Array, "batch time ..."]], Carry]]


def compute_loss(
    model: LanguageModel, params: Params, ids: Ids, context: int | None = None
) -> float:
    """Compute the mean of `compute_token_losses` for a text of two tokens or more."""
    return float(compute_token_losses(model, params, ids, context).mean(dtype=np.float64))


def compute_token_losses(
    model: LanguageModel, params: Params, ids: Ids, context: int | None = None
) -> Float[np.ndarray, " losses"]:
    """Compute the loss of each token of a text but the first, in nats.

    A text of at most `LONGEST_IN_ONE` tokens is read in one stream, with the carry kept; a longer
    one as `_STREAMS` parallel streams, each of which first reads the `_PRECEDING` tokens before its
    start. With a `context`, the text is cut into consecutive windows of that number of inputs, of
    which the last may have fewer, and each is read from a zero carry.
    """
    if (end := len(ids) - 1) < 1:
        return np.zeros(0, np.float32)
    if not context:
        return read_chunks(compute_chunk_losses, model, params, iterate_chunks(ids))
    parts, windows = [], min(_STREAMS, -(-end // context))
    length = -(-context // -(-context // _STREAMS_CHUNK))  # Equal chunks, of 64 tokens at most.
    for start in range(0, end, windows * context):
        bounds = np.minimum(start + context * np.arange(windows + 1), end)
        chunks = _cut_chunks(ids, bounds[:-1], bounds, length)
        parts.append(read_chunks(compute_chunk_losses, model, params, chunks))
    return np.concatenate(parts)


def read_chunks(
    reader: Reader, model: LanguageModel, params: Params, chunks: Iterable[Chunk]
) -> Any:
    """Return the results of `reader`, such as `compute_chunk_losses`, for the targets that count.

    They are arrays [n, ...] in the order of the text, or a tree of them. The carry is kept from
    chunk to chunk.
    """
    results, counted, carry = [], [], None
    for chunk in chunks:
        if carry is None:
            carry = first_carry(model, params, len(chunk[0]))
        result, carry = reader(model, params, chunk, carry)
        results.append(jax.tree.map(np.asarray, result))
        counted.append(chunk[2])
    mask = np.concatenate(counted, axis=1)  # Stream by stream.
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[mask], *results)


def round_length(time: int) -> int:
    """Round `time` up to a power of two, at least 16, so that few lengths are compiled."""
    return max(16, 1 << max(time - 1, 0).bit_length())


def iterate_chunks(ids: Ids, length: int | None = None) -> Iterator[Chunk]:
    """Yield a text in chunks of one shape, [streams, time]; padding at its end does not count.

    With a `length`, chunks are of one stream and have that length; without, they are those of
    `compute_token_losses`.
    """
    streams = 1 if length or len(ids) <= LONGEST_IN_ONE else _STREAMS
    if not length:
        length = min(round_length(len(ids) - 1), _CHUNK) if streams == 1 else _STREAMS_CHUNK
    bounds = (len(ids) - 1) * np.arange(streams + 1) // streams
    return _cut_chunks(ids, np.maximum(bounds[:-1] - _PRECEDING, 0), bounds, length)


def _cut_chunks(ids: Ids, begins: np.ndarray, bounds: np.ndarray, length: int) -> Iterator[Chunk]:
    """Yield chunks of parallel streams.

    Stream s reads from begins[s] on, and its targets from bounds[s] to bounds[s + 1] count.
    """
    for start in range(0, int((bounds[1:] - begins).max()), length):
        windows = np.zeros((len(begins), length + 1), np.int32)
        for window, begin, end in zip(windows, begins + start, bounds[1:], strict=True):
            part = ids[begin : max(begin, min(begin + length, end) + 1)]
            window[: len(part)] = part
        positions = begins[:, None] + start + np.arange(length)
        counted = (positions >= bounds[:-1, None]) & (positions < bounds[1:, None])
        yield windows[:, :-1], windows[:, 1:], counted


@jax.jit(static_argnames="model")
def compute_chunk_losses(
    model: LanguageModel, params: Params, chunk: Chunk, carry: Carry
) -> tuple[Float[Array, "batch time"], Carry]:
    """Return the losses of a chunk in nats, 0 for targets that do not count.

    Also return the carry after its inputs.
    """
    inputs, targets, counted = chunk
    losses, carry = model.measure(params, inputs, targets, carry)
    return jnp.where(counted, losses, 0), carry


def compute_perplexity(loss: float) -> float:
    """Return the exponential of a loss in nats per token; infinity where a float overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def compute_bits_per_character(loss: float, size: TextSize) -> float:
    """Convert a loss to bits per Unicode character, to compare tokens of any kind.

    A token that is not in the vocabulary is predicted only as [UNK]. Spelling it out adds eight
    bits for each byte of its UTF-8 and for an end mark.

    The loss is in nats per token. The size is that of the measured text without its first token.
    """
    tokens, characters, unknown_bytes = size
    return (loss / math.log(2) * tokens + 8 * unknown_bytes) / characters
