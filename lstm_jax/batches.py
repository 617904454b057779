"""Ids to training batches, as Grain pipelines whose iterators can be checkpointed."""

import functools
import math
from typing import NamedTuple, Protocol

import grain
import numpy as np
from ml_collections import ConfigDict

from lstm_jax.data.prepared import FileIds
from lstm_jax.data.texts import Ids
from lstm_jax.errors import UserError


class Batch(NamedTuple):
    """What one training step reads.

    Attributes:
      inputs: int32 [batch, time].
      targets: int32 [batch, time], the inputs shifted by one: targets[b, t] follows inputs[b, t].
      starts: bool [], whether the text starts anew here, so that the carry must be zero.
    """

    inputs: np.ndarray
    targets: np.ndarray
    starts: np.bool_


class Places(NamedTuple):
    """Where in a text the windows of a batch are, for whoever has the text to cut them himself.

    Attributes:
      begins: int64 [batch], of the first input of each.
      starts: see `Batch`.
    """

    begins: np.ndarray
    starts: np.bool_


class _Order(Protocol):
    """Where each training step reads."""

    steps_per_epoch: int

    def __getitem__(self, step: int) -> Places: ...


class Windows:
    """Non-overlapping windows of one text, shuffled anew every epoch.

    Window k is ids[k*T : (k+1)*T + 1]: T inputs and their T targets, so that each target of the
    text stands in exactly one window (but for a remainder shorter than a window).
    """

    def __init__(self, length: int, batch_size: int, window_length: int, seed: int) -> None:
        """Takes the number of ids, the sizes, and what the order follows from."""
        self._batch_size = batch_size
        self._window_length = window_length
        windows = (length - 1) // window_length
        self.steps_per_epoch = windows // batch_size
        self._windows = windows
        self._seed = seed

    def __getitem__(self, step: int) -> Places:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        places = step_in_epoch * self._batch_size + np.arange(self._batch_size)
        windows = shuffle_places(places, self._windows, _keys(self._seed, epoch))
        return Places(windows * self._window_length, np.bool_(True))


def shuffle_places(places: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """What stands at some places of a pseudorandom order of 0..length-1, in constant memory.

    A Feistel network over pairs of digits, of which there are hardly more than numbers in the
    order; what falls outside is put through it again until it is inside (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"). Grain's `index_shuffle` does one place a call, which
    takes longer than to read a window there.

    Args:
      places: int [n], each below `length`.
      length: of the order, at most 2**62.
      keys: uint64 [rounds], which decide the order. Fewer than 8 are felt in orders of a dozen.

    Returns:
      int64 [n].
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
    """Uint64 to uint64 below 2**32, each bit of which depends on all of x."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    return ((x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(32)


@functools.lru_cache(maxsize=2)
def _keys(seed: int, epoch: int) -> np.ndarray:
    """The keys of `shuffle_places` for an epoch."""
    return np.random.default_rng((seed, epoch)).integers(2**63, size=8, dtype=np.uint64)


class Streams:
    """Contiguous streams of one text, read side by side.

    The text is cut into `batch_size` streams of equal length. Step k of an epoch reads the k-th
    window of each, so that the carry after a step is the right one for the next. Every epoch draws
    anew where the first stream starts, so that windows begin at other places and the remainder
    that no stream reaches is another.
    """

    def __init__(self, length: int, batch_size: int, window_length: int, seed: int) -> None:
        """Takes the number of ids, the sizes, and what the offsets follow from."""
        self._batch_size = batch_size
        self._window_length = window_length
        self._seed = seed
        # One window is kept back: it is what the offset has to move in, at the least.
        self.steps_per_epoch = (length - window_length) // (batch_size * window_length)
        self._stream_length = self.steps_per_epoch * window_length
        self._slack = length - 1 - batch_size * self._stream_length

    def __getitem__(self, step: int) -> Places:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        offset = np.random.default_rng((self._seed, epoch)).integers(self._slack + 1)
        starts = offset + self._stream_length * np.arange(self._batch_size)
        return Places(starts + step_in_epoch * self._window_length, np.bool_(step_in_epoch == 0))


class _Steps:
    """What every training step reads, as a random-access source for Grain."""

    def __init__(
        self, order: _Order, ids: Ids | None, window_length: int, part: tuple[int, int]
    ) -> None:
        """Takes the order, the ids that windows are cut from (None: they are not), T, and `part`.

        Of each batch, only the part (k, n) is read: the k-th of n equal ones.
        """
        self._order = order
        self._ids = ids
        self._window_length = window_length
        self._part = part

    def __len__(self) -> int:
        # Grain counts epochs itself only where every epoch has the same elements.
        return 2**31

    def __getitem__(self, step: int) -> Batch | Places:
        places, (index, number) = self._order[step], self._part
        places = places._replace(begins=places.begins.reshape(number, -1)[index])
        return places if self._ids is None else cut_batch(self._ids, places, self._window_length)


def cut_batch(ids: Ids, places: Places, window_length: int) -> Batch:
    """The batch whose windows are at `places`."""
    if isinstance(ids, FileIds):
        windows = ids.cut(places.begins, window_length + 1)
    else:
        windows = ids[places.begins[:, None] + np.arange(window_length + 1)]
    return Batch(windows[:, :-1], windows[:, 1:], places.starts)


def make_order(length: int, batches: ConfigDict, seed: int) -> _Order:
    """Where each training step reads in a text, by its number from 0 on.

    Args:
      length: of the training text, in tokens.
      batches: the `batches` fields of a config.
      seed: what the order follows from.

    Raises:
      UserError: if the text is shorter than one batch.
    """
    size, window = batches.batch_size, batches.window_length
    kind = Windows if batches.kind == "windows" else Streams
    steps: _Order = kind(length, size, window, seed)
    if steps.steps_per_epoch < 1:
        needed = size * window + (1 if batches.kind == "windows" else window)
        raise UserError(
            f"the training text is too short: {size} {batches.kind} of {window} need {needed} "
            f"tokens and it has {length}; lower batches.batch_size or batches.window_length"
        )
    return steps


def make_batches(
    ids: Ids,
    batches: ConfigDict,
    seed: int,
    places: bool = False,
    part: tuple[int, int] = (0, 1),
) -> tuple[grain.DatasetIterator, int]:
    """The endless iterator over training batches, and how many of them make an epoch.

    Args:
      ids: the training text.
      batches: the `batches` fields of a config.
      seed: what the order follows from.
      places: whether to tell only where the windows of each batch are.
      part: (k, n) for the k-th of n equal parts of each batch, which is all that is read.

    Returns:
      An iterator over `Batch`, which Grain reads ahead of the training loop, or over `Places`; and
      the number of steps an epoch. Both iterators have the same states.

    Raises:
      UserError: if the text is shorter than one batch.
    """
    steps = make_order(len(ids), batches, seed)
    source = _Steps(steps, None if places else ids, batches.window_length, part)
    # Places are computed sooner than another thread would have handed them over.
    options = grain.ReadOptions(
        num_threads=0 if places else 1, prefetch_buffer_size=0 if places else 8
    )
    dataset = grain.MapDataset.source(source)
    return iter(dataset.to_iter_dataset(options)), steps.steps_per_epoch
