"""Feed batches to the devices: cut them there from a text that fits, else copy them in advance."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lstm_jax.batches import Batch, Offsets, cut_batch
from lstm_jax.devices import parallel
from lstm_jax.vocabulary import Ids

_SHARE = 1 / 8  # Fraction of a GPU's or TPU's memory that a text may take.


class Resident(NamedTuple):
    """A batch that is still to be cut from a text on the device."""

    ids: jax.Array  # The whole text, [n], in the smallest dtype that holds the vocabulary.
    predictions: jax.Array | None  # Of teachers, for each token; see `batches.cut_batch`.
    offsets: Offsets  # Where the batch's windows begin, int32 [batch].


def jit_steps(
    train_step: Callable[[Any, Batch], Any], window_length: int
) -> Callable[[Any, Batch | Resident], Any]:
    """Return a jitted function that takes the steps of a batch of a `Feed`; it donates the state.

    A batch whose arrays have an additional leading axis holds several consecutive steps.
    """

    def train_steps(state: Any, batch: Batch | Resident) -> Any:
        def take_step(state: Any, step: Any) -> tuple[Any, None]:
            if isinstance(batch, Resident):
                step = cut_batch(batch.ids, step, window_length, batch.predictions)
            return train_step(state, step), None

        steps = batch.offsets if isinstance(batch, Resident) else batch
        if steps.starts.ndim:
            return jax.lax.scan(take_step, state, steps)[0]
        return take_step(state, steps)[0]

    return jax.jit(train_steps, donate_argnums=0)


def fits_on_device(ids: Ids, vocabulary_size: int) -> bool:
    """Return whether to keep a text on the devices, where offsets are int32.

    A CPU keeps it if it is in memory already, another device if it takes at most an eighth of its
    memory.
    """
    device = jax.local_devices()[0]
    if len(ids) >= 2**31:
        return False
    if device.platform == "cpu":
        return not isinstance(ids, np.memmap)
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return len(ids) * np.min_scalar_type(vocabulary_size - 1).itemsize <= _SHARE * memory


def place_text(ids: Ids, vocabulary_size: int, mesh: Mesh) -> jax.Array:
    """Copy a text to every device, in the smallest dtype that holds the vocabulary."""
    small = np.asarray(ids, np.min_scalar_type(vocabulary_size - 1))
    return parallel.place_local(small, mesh, parallel.EVERYWHERE)


class Feed(NamedTuple):
    """The batches of an iterator, on the devices of a mesh.

    JAX dispatches steps asynchronously, so a batch is copied while the devices still compute the
    steps before it.
    """

    iterator: Iterator[Any]
    mesh: Mesh
    text: jax.Array | None  # What batches are cut from, if the iterator yields offsets.
    predictions: jax.Array | None = None  # See `Resident`.

    def next(self, steps: int = 1) -> Batch | Resident:
        """Return the next batch, or the batches of several steps stacked along a leading axis."""
        read = [next(self.iterator) for _ in range(steps)]
        if self.text is None:
            return self._place(read)
        narrow = [Offsets(offsets.begins.astype(np.int32), offsets.starts) for offsets in read]
        return Resident(self.text, self.predictions, self._place(narrow))

    def _place(self, read: list[Any]) -> Any:
        """Divide the rows of a batch over the devices; stack several batches."""
        rows = PartitionSpec(*[None] * (len(read) > 1), *parallel.DIVIDED)
        batch = read[0] if len(read) == 1 else jax.tree.map(lambda *x: np.stack(x), *read)
        starts = parallel.place_local(batch.starts, self.mesh, parallel.EVERYWHERE)
        divided = parallel.place_local(batch._replace(starts=()), self.mesh, rows)
        return divided._replace(starts=starts)
