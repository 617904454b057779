"""Make training batches of token ids, with iterators that can start at any step."""

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
) -> Iterator[Batch]:
    """Yield the training batches of one epoch after the other, without end.

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
      UserError: with the first batch, if the text is shorter than one.
    """
    steps_per_epoch = count_steps(len(ids), batches)
    streams = np.arange(batches.batch_size).reshape(part[1], -1)[part[0]]
    offsets = np.arange(batches.window_length + 1)  # Of the inputs, and of the last target.
    first_epoch, first_step = divmod(first_step, steps_per_epoch)
    for epoch in itertools.count(first_epoch):
        start, windows, reset = _draw_epoch(len(ids), batches, seed, epoch)
        for step in range(first_step, steps_per_epoch):
            begins = start + windows[streams, step].astype(np.int64) * batches.window_length
            positions = (begins[:, None] + offsets) % len(ids)
            tokens = ids[positions].astype(np.int32, copy=False)
            soft_targets = None if predictions is None else predictions[positions[:, 1:]]
            yield Batch(tokens[:, :-1], tokens[:, 1:], reset[streams, step], soft_targets)
        first_step = 0  # Of the next epoch.


def _draw_epoch(
    length: int, batches: BatchesConfig, seed: int, epoch: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Draw the order in which an epoch reads the windows of a text of `length` tokens.

    Return the position of window 0, in tokens; the number of the window that each stream reads at
    each step, integers [batch_size, steps]; and whether a segment begins with it, bool of the same
    shape.
    """
    rng = np.random.default_rng((seed, epoch))
    shape = batches.batch_size, count_steps(length, batches)
    probability = 1 if batches.kind == "windows" else batches.reset_probability
    reset = rng.random(shape, np.float32) < probability
    reset[:, 0] = True
    # The first window of each segment, by its position in the streams, which follow one another,
    # and then by that in the text. In the smallest dtype, 10 million windows take 40 MB.
    stream_windows = np.flatnonzero(reset).astype(np.min_scalar_type(-reset.size))
    sizes = np.diff(stream_windows, append=reset.size)  # Windows of each segment.
    order = rng.permutation(len(sizes))  # Of the segments in the text.
    text_windows = np.empty_like(stream_windows)
    text_windows[order] = np.cumsum(sizes[order]) - sizes[order]
    # In both, the other windows of a segment follow its first one.
    windows = np.repeat(text_windows - stream_windows, sizes)
    windows += np.arange(reset.size, dtype=windows.dtype)
    return int(rng.integers(length)), windows.reshape(shape), reset
