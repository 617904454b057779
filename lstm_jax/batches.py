"""Make training batches of token ids, with iterators that can start at any step."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax.config import BatchesConfig
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Ids


class Batch(NamedTuple):
    """The data of one training step; of several, with an additional leading axis."""

    inputs: Any  # int32 [batch, time].
    targets: Any  # int32 [batch, time]: targets[b, t] follows inputs[b, t] in the text.
    starts: Any  # bool [], whether a new text starts here, from the initial carry.
    soft_targets: jax.Array | None = None  # float16 [batch, time, vocabulary], of teachers.


# Where the windows of a batch begin in the text, int64 [batch], and its `starts`.
Place = tuple[np.ndarray, np.bool_]


class Windows:
    """Non-overlapping windows of one text, reshuffled every epoch.

    Window k is ids[k*T : (k+1)*T + 1]: T inputs and their T targets, so that each target of the
    text is in exactly one window (except for a remainder shorter than a window).
    """

    def __init__(self, length: int, batch_size: int, window_length: int, seed: int) -> None:
        self._batch_size, self._window_length, self._seed = batch_size, window_length, seed
        self._windows = (length - 1) // window_length
        self.steps_per_epoch = self._windows // batch_size
        self._shuffled = -1, np.zeros(0, np.uint8)  # An epoch and its order of windows.

    def __getitem__(self, step: int) -> Place:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        of_epoch, order = self._shuffled
        if of_epoch != epoch:
            # In the smallest dtype: 40 MB for 10 million windows.
            order = np.arange(self._windows, dtype=np.min_scalar_type(self._windows))
            np.random.default_rng((self._seed, epoch)).shuffle(order)
            self._shuffled = epoch, order
        first = step_in_epoch * self._batch_size
        windows = order[first : first + self._batch_size].astype(np.int64)
        return windows * self._window_length, np.bool_(True)


class Streams:
    """Contiguous streams of one text, read in parallel.

    The text is cut into `batch_size` streams of equal length. Step k of an epoch reads the k-th
    window of each stream, so that the next step continues from the carry. Every epoch draws a new
    offset of the first stream, so that windows begin at other positions and another remainder is
    left out.
    """

    def __init__(self, length: int, batch_size: int, window_length: int, seed: int) -> None:
        self._batch_size, self._window_length, self._seed = batch_size, window_length, seed
        # At least window_length - 1 tokens are left out, so that the offset can vary.
        self.steps_per_epoch = (length - window_length) // (batch_size * window_length)
        self._stream_length = self.steps_per_epoch * window_length
        self._slack = length - 1 - batch_size * self._stream_length

    def __getitem__(self, step: int) -> Place:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        offset = np.random.default_rng((self._seed, epoch)).integers(self._slack + 1)
        begins = offset + self._stream_length * np.arange(self._batch_size)
        return begins + step_in_epoch * self._window_length, np.bool_(step_in_epoch == 0)


def cut_batch(
    ids: Ids | jax.Array,
    begins: Any,
    starts: Any,
    window_length: int,
    predictions: jax.Array | None = None,
) -> Batch:
    """Return the batch whose windows begin at `begins` [batch], on the host or on the device.

    `predictions` are the probabilities that teachers give to each token of the text, [n,
    vocabulary].
    """
    windows: Any = ids[begins[..., None] + np.arange(window_length + 1, dtype=np.int32)]
    windows = windows.astype(np.int32, copy=False)
    soft_targets = None
    if predictions is not None:  # Slices: to gather rows, a TPU would copy the whole array.
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, predictions, slice_size=window_length)
        soft_targets = jnp.vectorize(cut, signature="()->(t,v)")(begins + 1)
    return Batch(windows[..., :-1], windows[..., 1:], starts, soft_targets)


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
    ids: Ids, batches: BatchesConfig, seed: int, part: tuple[int, int] = (0, 1), first_step: int = 0
) -> tuple[Iterator[Batch], int]:
    """Return an endless iterator over training batches, and the number of steps per epoch.

    Grain reads them in advance. `seed` determines the order; `part` is (k, n) for the k-th of n
    equal parts of each batch, and only this part is read; `first_step` is that of the first batch.
    Raise `UserError` if the text is shorter than one batch.
    """
    import grain  # Importing it takes a tenth of a second.

    order, (index, number) = make_order(len(ids), batches, seed), part

    def read_step(step: int) -> Batch:
        begins, starts = order[step]
        return cut_batch(ids, begins.reshape(number, -1)[index], starts, batches.window_length)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    steps = grain.MapDataset.range(first_step, 2**31)  # Grain's epochs would be the same.
    return iter(steps.map(read_step).to_iter_dataset(options)), order.steps_per_epoch
