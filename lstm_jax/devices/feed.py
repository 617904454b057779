"""Feed batches to the devices, cut there from a text that fits, or else copied in advance."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lstm_jax.batches import Batch, Order, cut_batch
from lstm_jax.config import BatchesConfig
from lstm_jax.devices import processes
from lstm_jax.devices.mesh import DIVIDED, EVERYWHERE, place_local
from lstm_jax.vocabulary import Ids

_SHARE = 1 / 8  # Fraction of a GPU's or TPU's memory that a text may take.


def feed_batches(
    ids: Ids,
    batches: BatchesConfig,
    seed: int,
    mesh: Mesh,
    first_step: int = 0,
    predictions: np.ndarray | None = None,
    on_devices: bool | None = None,
) -> Iterator[Batch]:
    """Yield the batches of a training text, on the devices of a mesh, from one step on.

    JAX dispatches steps asynchronously, so a batch is copied or cut while the devices still compute
    the steps before it. By default, the size of the text decides whether batches are cut on the
    devices; with the predictions of teachers (`cut_batch`), they are.
    """
    order = Order(len(ids), batches, seed, (jax.process_index(), jax.process_count()))
    if on_devices is None:
        fits = predictions is not None or _fits_on_device(ids)
        on_devices = not processes.max_over_processes(not fits)
    cut: Any = functools.partial(cut_batch, window_length=batches.window_length)
    if on_devices:
        text, cut = place_local(ids, mesh, EVERYWHERE), jax.jit(cut)
        if predictions is not None:
            again = np.concatenate([predictions, predictions[: batches.window_length]])
            predictions = place_local(again, mesh, EVERYWHERE)
    for begins, reset in map(order.__getitem__, itertools.count(first_step)):
        if on_devices:
            place = place_local((begins.astype(np.int32), reset), mesh, DIVIDED)
            yield cut(text, *place, predictions=predictions)
        else:
            yield place_local(cut(ids, begins, reset), mesh, DIVIDED)


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
