"""Make training batches of token ids, with Grain iterators that can be checkpointed."""

import functools
import math
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from lstm_jax.config import BatchesConfig
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Ids


class Batch(NamedTuple):
    """The data of one training step."""

    inputs: np.ndarray  # int32 [batch, time].
    targets: np.ndarray  # int32 [batch, time]: targets[b, t] follows inputs[b, t] in the text.
    starts: np.bool_  # bool [], whether a new text starts here, so that the carry must be zero.


class Places(NamedTuple):
    """The positions of a batch's windows in the text."""

    begins: np.ndarray  # int64 [batch], the position of each window's first input.
    starts: np.bool_  # See `Batch`.


class Windows:
    """Non-overlapping windows of one text, reshuffled every epoch.

    Window k is ids[k*T : (k+1)*T + 1]: T inputs and their T targets, so that each target of the
    text is in exactly one window (except for a remainder shorter than a window).
    """

    def __init__(self, length: int, batch_size: int, window_length: int, seed: int) -> None:
        self._batch_size, self._window_length, self._seed = batch_size, window_length, seed
        self._windows = (length - 1) // window_length
        self.steps_per_epoch = self._windows // batch_size

    def __getitem__(self, step: int) -> Places:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        places = step_in_epoch * self._batch_size + np.arange(self._batch_size)
        windows = shuffle_places(places, self._windows, _keys(self._seed, epoch))
        return Places(windows * self._window_length, np.bool_(True))


def shuffle_places(places: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """Return the entries at `places` of a pseudorandom permutation of 0..length-1, int64 [n].

    A Feistel network permutes pairs of digits, of which there are slightly more than `length`. A
    result of `length` or more passes through it again until it is smaller (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"). `numpy.random.Generator.permutation` would need memory
    for the whole permutation, and Grain's `index_shuffle`, one entry per call, is slower than
    reading a window. Either would change the order of batches in existing runs.

    `length` is at most 2**62. The keys, uint64 [rounds], determine the permutation; with fewer than
    8 keys, permutations of a dozen entries are biased.
    """
    large = math.isqrt(length - 1) + 1
    digits = np.array([large, -(-length // large)], np.uint64)
    high, low = np.divmod(places.astype(np.uint64), digits[1])
    pair, outside = [high, low], np.ones(len(places), bool)
    while outside.any():
        moved = [digit[outside] for digit in pair]
        for k, key in enumerate(keys):
            other, own = moved[(k + 1) % 2], moved[k % 2]
            moved[k % 2] = (own + _hash(other + key)) % digits[k % 2]
        for digit, new in zip(pair, moved, strict=True):
            digit[outside] = new
        outside = pair[0] * digits[1] + pair[1] >= length
    return (pair[0] * digits[1] + pair[1]).astype(np.int64)


def _hash(x: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64 below 2**32; each bit depends on all bits of x."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    return ((x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(32)


@functools.lru_cache(maxsize=2)
def _keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).integers(2**63, size=8, dtype=np.uint64)


class Streams:
    """Contiguous streams of one text, read in parallel.

    The text is cut into `batch_size` streams of equal length. Step k of an epoch reads the k-th
    window of each stream, so that the next step continues from the carry. Every epoch draws a new
    offset of the first stream, so that windows begin at other positions and another remainder is
    left out.
    """

    def __init__(self, length: int, batch_size: int, window_length: int, seed: int) -> None:
        self._batch_size, self._window_length, self._seed = batch_size, window_length, seed
        # At least one window is left out, so that the offset can vary.
        self.steps_per_epoch = (length - window_length) // (batch_size * window_length)
        self._stream_length = self.steps_per_epoch * window_length
        self._slack = length - 1 - batch_size * self._stream_length

    def __getitem__(self, step: int) -> Places:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        offset = np.random.default_rng((self._seed, epoch)).integers(self._slack + 1)
        starts = offset + self._stream_length * np.arange(self._batch_size)
        return Places(starts + step_in_epoch * self._window_length, np.bool_(step_in_epoch == 0))


def cut_batch(ids: Ids | jax.Array, places: Places, window_length: int) -> Batch:
    """Return the batch whose windows begin at `places`, on the host or on the device."""
    columns = np.arange(window_length + 1, dtype=np.int32)
    windows: Any = ids[places.begins[:, None] + columns].astype(np.int32, copy=False)
    return Batch(windows[:, :-1], windows[:, 1:], places.starts)


def make_order(length: int, batches: BatchesConfig, seed: int) -> Windows | Streams:
    """Return the windows of each training step in a text of `length` tokens; see `make_batches`."""
    size, window = batches.batch_size, batches.window_length
    order = (Windows if batches.kind == "windows" else Streams)(length, size, window, seed)
    if order.steps_per_epoch < 1:
        needed = size * window + (1 if batches.kind == "windows" else window)
        raise UserError(
            f"the training text is too short: {size} {batches.kind} of {window} need {needed} "
            f"tokens, but it has {length}; lower batches.batch_size or batches.window_length"
        )
    return order


def make_batches(
    ids: Ids,
    batches: BatchesConfig,
    seed: int,
    places: bool = False,
    part: tuple[int, int] = (0, 1),
) -> tuple[grain.DatasetIterator, int]:
    """Return an endless iterator over training batches, and the number of steps per epoch.

    Args:
      ids: the training text.
      batches: the `batches` fields of a config.
      seed: determines the order.
      places: whether to return only the positions of the windows.
      part: (k, n) for the k-th of n equal parts of each batch; only this part is read.

    Returns:
      An iterator over `Batch`, which Grain prefetches, or over `Places`, with the same state in
      checkpoints; and the number of steps per epoch.

    Raises:
      UserError: if the text is shorter than one batch.
    """
    order, window_length = make_order(len(ids), batches, seed), batches.window_length
    index, number = part

    def read_step(step: int) -> Batch | Places:
        found = order[step]
        found = found._replace(begins=found.begins.reshape(number, -1)[index])
        return found if places else cut_batch(ids, found, window_length)

    # Computing positions is faster than receiving them from another thread.
    threads, ahead = (0, 0) if places else (1, 8)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    # Endless: Grain's own epochs would all have the same elements.
    dataset = grain.MapDataset.range(2**31).map(read_step).to_iter_dataset(options)
    return iter(dataset), order.steps_per_epoch
