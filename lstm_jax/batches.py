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


class Order:
    """The places in the text of the windows of each training step.

    An epoch reads the text as a circle, from a random position on: the first token follows the
    last one. Less than a batch is left out. Each of the `batch_size` streams reads the same number
    of windows. At each step, a stream starts another segment of the text with probability
    `reset_probability`, or always (`windows`), and otherwise continues. The segments are shuffled,
    so that other parts of the text meet in a batch in each epoch.
    """

    def __init__(
        self, length: int, batches: BatchesConfig, seed: int, part: tuple[int, int] = (0, 1)
    ) -> None:
        """Prepare the order of a text of `length` tokens, or of a part of each batch.

        `part` is (k, n) for the k-th of n equal parts. Raise `UserError` if the text is shorter
        than one batch.
        """
        size, self._window_length = batches.batch_size, batches.window_length
        if length < (needed := size * self._window_length):
            raise UserError(
                f"the training text is too short: {size} {batches.kind} of {self._window_length} "
                f"need {needed} tokens, but it has {length}; lower "
                "--config.batches.batch_size or --config.batches.window_length"
            )
        self.steps_per_epoch = length // needed
        self._length, self._seed = length, seed
        self._reset_probability = 1 if batches.kind == "windows" else batches.reset_probability
        # Windows are numbered by stream, then by step: this is the first one of each stream. In the
        # smallest dtype, the two arrays of an epoch take 80 MB for 10 million windows.
        self._num_windows = size * self.steps_per_epoch
        dtype = np.min_scalar_type(-self._num_windows)
        self._first = np.arange(0, self._num_windows, self.steps_per_epoch, dtype=dtype)
        self._first_of_part = self._first.reshape(part[1], -1)[part[0]]
        self._segments = functools.lru_cache(1)(self._draw_segments)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where in the text windows begin, int64 [batch], and which start segments, bool."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        offset, first, before = self._segments(epoch)
        windows = self._first_of_part + step_in_epoch
        segments = np.searchsorted(first, windows, side="right") - 1
        since = windows - first[segments]
        begins = offset + (before[segments] + since).astype(np.int64) * self._window_length
        return begins % self._length, since == 0

    def _draw_segments(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the position that an epoch begins at, and its segments in the order of streams.

        For each segment, return its first window, and the number of windows before it in the text.
        """
        rng = np.random.default_rng((self._seed, epoch))
        is_first = rng.random(self._num_windows, np.float32) < self._reset_probability
        is_first[self._first] = True
        first = np.flatnonzero(is_first).astype(self._first.dtype)
        order = rng.permutation(np.arange(len(first), dtype=first.dtype))
        lengths = np.diff(first, append=self._num_windows)[order]
        before = np.empty_like(first)
        before[order] = np.cumsum(lengths) - lengths
        return int(rng.integers(self._length)), first, before


def make_batches(
    ids: Ids,
    batches: BatchesConfig,
    seed: int,
    part: tuple[int, int] = (0, 1),
    first_step: int = 0,
    predictions: np.ndarray | None = None,
) -> tuple[Iterator[Batch], int]:
    """Return an endless iterator over training batches, and the number of steps per epoch.

    After the last token of the text comes the first one. Raise `UserError` if the text is shorter
    than one batch.

    Args:
      ids: the text.
      batches: the size and kind of batches.
      seed: determines the order.
      part: (k, n) for the k-th of n equal parts of each batch; only this part is read.
      first_step: the step of the first batch.
      predictions: the probabilities that teachers give to each token of the text, [n, vocabulary].
    """
    order = Order(len(ids), batches, seed, part)
    offsets = np.arange(batches.window_length + 1)

    def cut(begins: np.ndarray, reset: np.ndarray) -> Batch:
        positions = (begins[:, None] + offsets) % len(ids)
        windows = ids[positions].astype(np.int32, copy=False)
        soft_targets = None if predictions is None else predictions[positions[:, 1:]]
        return Batch(windows[:, :-1], windows[:, 1:], reset, soft_targets)

    return (cut(*order[step]) for step in itertools.count(first_step)), order.steps_per_epoch
