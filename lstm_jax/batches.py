"""Make training batches of token ids, with iterators that can start at any step."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lstm_jax.config import BatchesConfig
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Ids


class Batch(NamedTuple):
    """The data of one training step."""

    inputs: Any  # int32 [batch, time].
    targets: Any  # int32 [batch, time]: targets[b, t] follows inputs[b, t] in the text.
    reset: Any  # bool [batch], whether a row reads the initial carry.
    soft_targets: Any = None  # float16 [batch, time, vocabulary], of teachers.


def count_steps(length: int, batches: BatchesConfig) -> int:
    """Return the steps of an epoch of `length` tokens; raise `UserError` if that is no batch."""
    if length < (needed := batches.batch_size * batches.window_length):
        raise UserError(
            f"the training text is too short: {batches.batch_size} {batches.kind} of "
            f"{batches.window_length} need {needed} tokens, but it has {length}; lower "
            "--config.batches.batch_size or --config.batches.window_length"
        )
    return length // needed


def make_batches(
    ids: Ids,
    batches: BatchesConfig,
    seed: int,
    part: tuple[int, int] = (0, 1),
    first_step: int = 0,
    predictions: np.ndarray | None = None,
) -> tuple[Iterator[Batch], int]:
    """Return an endless iterator over training batches, and the number of steps per epoch.

    An epoch reads the text as a circle, from a random position on: the first token follows the
    last one. Less than a batch is left out. Each of the `batch_size` streams reads the same number
    of windows. At each step, a stream starts another segment of the text with probability
    `reset_probability`, or always (`windows`), and otherwise continues. The segments are shuffled,
    so that other parts of the text meet in a batch in each epoch.

    Args:
      ids: the text.
      batches: the size and kind of batches.
      seed: determines the order.
      part: (k, n) for the k-th of n equal parts of each batch; only this part is read.
      first_step: the step of the first batch.
      predictions: the probabilities that teachers give to each token of the text, [n, vocabulary].

    Raises:
      UserError: if the text is shorter than one batch.
    """
    steps_per_epoch = count_steps(len(ids), batches)
    # Windows are numbered by stream, then by step.
    streams = np.arange(batches.batch_size) * steps_per_epoch
    streams_of_part = streams.reshape(part[1], -1)[part[0]]
    offsets = np.arange(batches.window_length + 1)
    draw = functools.lru_cache(1)(functools.partial(_draw_segments, len(ids), batches, seed))

    def cut(step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        start, first, before = draw(epoch)
        # `searchsorted` would convert all of `first` to another dtype of the windows.
        windows = (streams_of_part + step_in_epoch).astype(first.dtype)
        segments = np.searchsorted(first, windows, side="right") - 1
        since = windows - first[segments]
        begins = start + (before[segments] + since).astype(np.int64) * batches.window_length
        positions = (begins[:, None] + offsets) % len(ids)
        tokens = ids[positions].astype(np.int32, copy=False)
        soft_targets = None if predictions is None else predictions[positions[:, 1:]]
        return Batch(tokens[:, :-1], tokens[:, 1:], since == 0, soft_targets)

    return map(cut, itertools.count(first_step)), steps_per_epoch


def _draw_segments(
    length: int, batches: BatchesConfig, seed: int, epoch: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the position that an epoch begins at, and its segments in the order of streams.

    For each segment, return its first window, and the number of windows before it in the text.
    """
    rng = np.random.default_rng((seed, epoch))
    steps_per_epoch = count_steps(length, batches)
    number = batches.batch_size * steps_per_epoch
    probability = 1 if batches.kind == "windows" else batches.reset_probability
    is_first = rng.random(number, np.float32) < probability
    is_first[::steps_per_epoch] = True  # Of each stream.
    # In the smallest dtype, the two arrays take 80 MB for 10 million windows.
    first = np.flatnonzero(is_first).astype(np.min_scalar_type(-number))
    order = rng.permutation(np.arange(len(first), dtype=first.dtype))
    lengths = np.diff(first, append=number)[order]
    before = np.empty_like(first)
    before[order] = np.cumsum(lengths) - lengths
    return int(rng.integers(length)), first, before
