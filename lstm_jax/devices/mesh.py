"""Make the mesh of the devices that train, and place arrays and batches on it.

Devices share the batch, and each holds all parameters. This suits recurrent layers of any kind:
with tensor parallelism, devices would have to exchange the hidden state at every position of the
window.
"""

from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lstm_jax.batches import Batch, make_batches
from lstm_jax.config import Config
from lstm_jax.devices import setup
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Ids

T = TypeVar("T")

DATA = "data"  # The name of the mesh axis.
EVERYWHERE, DIVIDED = PartitionSpec(), PartitionSpec(DATA)


def make_mesh(config: Config) -> Mesh:
    """Return the mesh of the devices that train with `config`, with the axis `DATA`.

    Raise `UserError` if there are too few devices, or they can't share the batch equally.
    """
    processes, number = jax.process_count(), config.mesh.data
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    # Devices of a process are adjacent, and so are its rows of a batch.
    by_process = np.array(devices).reshape(processes, -1)
    rows = config.batches.batch_size // config.optimizer.microbatches
    if not number:
        usable = by_process.shape[1]
        if devices[0].platform == "cpu":  # There may be fewer if JAX had started before.
            usable = min(usable, setup.count_useful_cores(config))
        divisors = (n for n in range(usable, 0, -1) if rows % (n * processes) == 0)
        number = processes * next(divisors, 1)
    if number > len(devices) or number % processes or rows % number:
        raise UserError(
            f"{number} devices can't share a batch: --config.mesh.data must be a multiple of the "
            f"number of processes, {processes}; at most the number of devices, {len(devices)}; and "
            f"divide --config.batches.batch_size / --config.optimizer.microbatches, {rows}"
        )
    return Mesh(by_process[:, : number // processes].reshape(-1), DATA)


def feed_batches(
    ids: Ids, config: Config, mesh: Mesh, first_step: int = 0, predictions: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield the batches of `make_batches`, on the devices of a mesh.

    Each process makes the part of its devices. JAX dispatches steps asynchronously, so a batch is
    copied while the devices still compute the steps before it.
    """
    part, sharding = (jax.process_index(), jax.process_count()), NamedSharding(mesh, DIVIDED)
    feed = make_batches(ids, config.batches, config.seed, part, first_step, predictions)
    return (jax.make_array_from_process_local_data(sharding, batch) for batch in feed)


def get_local_copy(tree: T) -> T:
    """Return arrays that every device holds on this process's first device, others as they are."""
    return jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else x, tree)
