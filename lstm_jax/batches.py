"""Ids to training batches, as Grain pipelines whose iterators can be checkpointed."""

from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

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


class Windows:
    """Non-overlapping windows of one text, as a random-access source for Grain.

    Window k is ids[k*T : (k+1)*T + 1]: T inputs and their T targets, so that each target of the
    text stands in exactly one window (but for a remainder shorter than a window).
    """

    def __init__(self, ids: np.ndarray, window_length: int) -> None:
        """Takes the ids of the text, int32 [n], and T."""
        self._ids = ids
        self._window_length = window_length

    def __len__(self) -> int:
        return (len(self._ids) - 1) // self._window_length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._window_length
        return self._ids[start : start + self._window_length + 1]


class Streams:
    """Contiguous streams of one text, read side by side, as a random-access source for Grain.

    The text is cut into `batch_size` streams of equal length. Step k of an epoch reads the k-th
    window of each, so that the carry after a step is the right one for the next. Every epoch draws
    anew where the first stream starts, so that windows begin at other places and the remainder
    that no stream reaches is another.
    """

    def __init__(
        self,
        ids: np.ndarray,
        batch_size: int,
        window_length: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Takes the ids of the text, int32 [n], the sizes, and what the offsets follow from.

        Of each batch, only the `part` (k, n) is read: the k-th of n equal ones.
        """
        index, number = part
        self._rows = np.arange(batch_size).reshape(number, -1)[index]
        self._ids = ids
        self._batch_size = batch_size
        self._window_length = window_length
        self._seed = seed
        # One window is kept back: it is what the offset has to move in, at the least.
        self.steps_per_epoch = (len(ids) - window_length) // (batch_size * window_length)
        self._stream_length = self.steps_per_epoch * window_length

    def __len__(self) -> int:
        # Grain counts epochs itself only where every epoch has the same elements.
        return 2**31

    def __getitem__(self, step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        slack = len(self._ids) - 1 - self._batch_size * self._stream_length
        offset = np.random.default_rng((self._seed, epoch)).integers(slack + 1)
        starts = offset + self._stream_length * self._rows
        columns = step_in_epoch * self._window_length + np.arange(self._window_length + 1)
        return _as_batch(self._ids[starts[:, None] + columns], starts=step_in_epoch == 0)


def _as_batch(windows: np.ndarray, starts: bool = True) -> Batch:
    """Splits int32 [batch, time + 1] into inputs and targets."""
    return Batch(windows[:, :-1], windows[:, 1:], np.bool_(starts))


def make(
    ids: np.ndarray, batches: ConfigDict, seed: int, part: tuple[int, int] = (0, 1)
) -> tuple[grain.DatasetIterator, int]:
    """The endless iterator over training batches, and how many of them make an epoch.

    Args:
      ids: the training text, int32 [n].
      batches: the `batches` fields of a config.
      seed: what the order follows from.
      part: (k, n) for the k-th of n equal parts of each batch, which is all that is read.

    Returns:
      An iterator over `Batch`, which Grain reads ahead of the training loop, and the number of
      steps an epoch.

    Raises:
      UserError: if the text is shorter than one batch.
    """
    size, length = batches.batch_size, batches.window_length
    index, number = part
    dataset: grain.MapDataset
    if batches.kind == "windows":
        windows = Windows(ids, length)
        steps_per_epoch = len(windows) // size
        needed = size * length + 1
        # Each batch is that of n parts, one after the other.
        dataset = grain.MapDataset.source(windows).shuffle(seed)
        dataset = dataset.batch(size // number, drop_remainder=True)
        dataset = dataset[index : steps_per_epoch * number : number].map(_as_batch).repeat()
    else:
        streams = Streams(ids, size, length, seed, part)
        steps_per_epoch = streams.steps_per_epoch
        needed = size * length + length
        dataset = grain.MapDataset.source(streams)
    if steps_per_epoch < 1:
        raise UserError(
            f"the training text is too short: {size} {batches.kind} of {length} need {needed} "
            f"tokens and it has {len(ids)}; lower batches.batch_size or batches.window_length"
        )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(dataset.to_iter_dataset(options)), steps_per_epoch
