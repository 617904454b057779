"""Feed batches to the devices, cut there from a text that fits, or else copied in advance."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lstm_jax.batches import Batch, Order, cut_batch, make_batches
from lstm_jax.config import Config
from lstm_jax.devices import processes
from lstm_jax.devices.mesh import DIVIDED, EVERYWHERE, place_local
from lstm_jax.vocabulary import Ids

_SHARE = 1 / 8  # Fraction of a GPU's or TPU's memory that a text may take.


class Feed:
    """The batches of a training text, on the devices of a mesh, from one step on.

    JAX dispatches steps asynchronously, so a batch is copied or cut while the devices still compute
    the steps before it.
    """

    def __init__(
        self,
        ids: Ids,
        config: Config,
        mesh: Mesh,
        first_step: int = 0,
        predictions: np.ndarray | None = None,
        on_devices: bool | None = None,
    ) -> None:
        """Copy the text, and the predictions of teachers (`cut_batch`), if they are cut there.

        By default, that depends on the size of the text; with predictions, they are.
        """
        fields, part = config.batches, (jax.process_index(), jax.process_count())
        self._mesh, self._cut = mesh, None
        if on_devices is None:
            fits = predictions is not None or _fits_on_device(ids)
            on_devices = not processes.max_over_processes(not fits)
        if not on_devices:
            self._read: Iterator[Any]
            self._read, _ = make_batches(ids, fields, config.seed, part, first_step)
            return
        order = Order(len(ids), fields, config.seed, part)
        places = map(order.__getitem__, itertools.count(first_step))
        self._read = ((begins.astype(np.int32), starts) for begins, starts in places)
        text = place_local(np.asarray(ids), mesh, EVERYWHERE)
        if predictions is not None:
            again = np.concatenate([predictions, predictions[: fields.window_length]])
            predictions = place_local(again, mesh, EVERYWHERE)
        cut = jax.jit(functools.partial(cut_batch, window_length=fields.window_length))
        self._cut = functools.partial(cut, text, predictions=predictions)

    def next(self, steps: int = 1) -> Batch:
        """Return the next batch, or the batches of several steps stacked along a leading axis."""
        read = [next(self._read) for _ in range(steps)]
        leading = int(steps > 1)
        arrays = jax.tree.map(lambda *x: np.stack(x), *read) if leading else read[0]
        rows = PartitionSpec(*[None] * leading, *DIVIDED)
        placed = jax.tree.map(lambda x: place_local(x, self._mesh, rows), arrays)
        return self._cut(*placed) if self._cut else placed


def _fits_on_device(ids: Ids) -> bool:
    """Return whether to keep a text on the devices, where positions, also past it, are int32.

    A CPU keeps it if it is in memory already, another device if it takes at most an eighth of its
    memory.
    """
    device = jax.local_devices()[0]
    if len(ids) >= 2**30:
        return False
    if device.platform == "cpu":
        return not isinstance(ids, np.memmap)
    return ids.nbytes <= _SHARE * (device.memory_stats() or {}).get("bytes_limit", 0)
