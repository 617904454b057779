"""Several devices: each has all parameters and its own part of the batch."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lstm_jax.errors import UserError

# The name of the mesh axis over which batches are divided.
DATA = "data"

EVERYWHERE = PartitionSpec()
DIVIDED = PartitionSpec(DATA)

# Where dividing a batch over the cores of a CPU was measured to be faster than multiplying each
# matrix on all of them (`benchmarks/train_step.py`, two cores): products of small layers are over
# sooner than several threads have shared them, those of large ones need every kernel twice.
_SMALLEST_HIDDEN, _LARGEST_HIDDEN = 64, 768
_SMALLEST_PART = 16


def use_cores(config: ConfigDict) -> None:
    """Lets JAX show as many CPU devices as training with `config` can use.

    It must be called before anything else uses JAX; otherwise, and where there is a GPU or TPU, it
    changes nothing.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started: it keeps what devices it has.
        jax.config.update("jax_num_cpu_devices", config.mesh.data or _cores_to_use(config))


def _cores_to_use(config: ConfigDict) -> int:
    batch_size = config.batches.batch_size
    if not _SMALLEST_HIDDEN <= config.model.hidden_size <= _LARGEST_HIDDEN:
        return 1
    return _largest_divisor(batch_size, min(cores(), max(batch_size // _SMALLEST_PART, 1)))


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if number % n == 0)


def make_mesh(config: ConfigDict) -> Mesh:
    """The devices that training with `config` uses, along the axis `DATA`.

    Raises:
      UserError: if there are fewer than `mesh.data`, or they can't share the batch equally.
    """
    devices, number, batch_size = jax.devices(), config.mesh.data, config.batches.batch_size
    if number > len(devices):
        raise UserError(
            f"config.mesh.data is {number}, and there are {len(devices)} devices here: lower it, "
            "or 0 for as many as can be used"
        )
    parts = number * config.optimizer.microbatches
    if number and batch_size % parts:
        raise UserError(
            f"config.batches.batch_size is {batch_size}: it must be a multiple of mesh.data times "
            f"optimizer.microbatches, {parts}"
        )
    if not number:
        shares = batch_size // config.optimizer.microbatches
        usable = _cores_to_use(config) if devices[0].platform == "cpu" else len(devices)
        number = _largest_divisor(shares, min(usable, len(devices)))
    return jax.make_mesh(
        (number,), (DATA,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:number]
    )


def place(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The arrays of a tree on the devices of a mesh: everywhere, or their first axis divided."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def on_one_device(tree: Any) -> Any:
    """Arrays that are everywhere, as the first device has them; nothing is copied."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def divide(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map`: runs `function` on each device, on its part of what is divided.

    Results that are the same everywhere must be made so, by `jax.lax.pmean`.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
