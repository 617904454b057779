"""Train on many devices, which share the batch and can share every large array.

The mesh has two axes. A batch is divided over all of its devices. Along the axis `DATA`, the
parameters, the optimizer state and averaged weights are replicated. Along the axis `MODEL`, their
matrices are divided, and gathered for each step, as in fully sharded data parallelism (Rajbhandari
et al. 2020, "ZeRO"). This suits recurrent layers of any kind: with tensor parallelism, devices
would have to exchange the hidden state at every position of the window.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lstm_jax.config import Config
from lstm_jax.errors import UserError
from lstm_jax.ops import choice
from lstm_jax.ops.processor import count_cores

T = TypeVar("T")

DATA, MODEL = "data", "model"  # The names of the mesh axes.
EVERYWHERE, DIVIDED = PartitionSpec(), PartitionSpec((DATA, MODEL))

# Sizes for which dividing a batch over CPU cores is faster than using all cores for each matmul, in
# `benchmarks/train_step.py` on two cores. Matmuls of smaller layers end before threads can share
# them; larger layers read each kernel from memory once per device. The library divides the work of
# a layer itself, so that devices need not exchange gradients.
_SMALLEST_HIDDEN, _LARGEST_HIDDEN, _LARGEST_HIDDEN_IN_C = 64, 768, 448
_SMALLEST_PART = 16


def use_cores(config: Config, least: int = 1) -> None:
    """Set the number of CPU devices that training with `config` may need, or `least` if it is more.

    The number is an upper bound: it is unknown, until devices exist, how many other processes there
    are and whether the library in C runs. Call it before anything else uses JAX; later, or with a
    GPU or TPU, it has no effect.
    """
    wanted = (config.mesh.data or _limit_cores(config)) * config.mesh.model
    given = jax.config.values["jax_num_cpu_devices"]  # The caller may have set it.
    number = max(least, wanted, given)
    with contextlib.suppress(RuntimeError):  # JAX has made its devices already.
        jax.config.update("jax_num_cpu_devices", number)
    if config.model.hidden_size > _LARGEST_HIDDEN_IN_C:
        # Steps on one device then run in the main thread, for which `memory` keeps arrays of any
        # size; smaller models gain more from steps that run while Python prepares the next.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _count_useful_cores(config: Config) -> int:
    """Return the number of CPU devices that train fastest, once there are devices."""
    model = config.model
    in_scan = model.recurrence in ("scan", "cudnn") or model.layer_norm or model.block != "none"
    is_fused = model.cell in ("lstm", "peephole", "gru", "rnn") and not in_scan
    dtype = choice.choose_dtype(is_fused) if model.dtype == "auto" else model.dtype
    is_large = model.hidden_size > _LARGEST_HIDDEN_IN_C
    if is_fused and is_large and choice.runs_in_c("windows", dtype, model.hidden_size):
        return 1
    return _limit_cores(config)


def _limit_cores(config: Config) -> int:
    """Return the number of CPU devices with which XLA trains fastest."""
    batch_size = config.batches.batch_size
    if not _SMALLEST_HIDDEN <= config.model.hidden_size <= _LARGEST_HIDDEN:
        return 1
    limit = min(count_cores(), max(batch_size // _SMALLEST_PART, 1))
    return max(n for n in range(1, limit + 1) if batch_size % n == 0)


def make_mesh(config: Config) -> Mesh:
    """Return the mesh of the devices that train with `config`, with the axes `DATA` and `MODEL`.

    Raises:
      UserError: if there are too few devices, or they can't share the batch or layers equally.
    """
    processes, batch_size = jax.process_count(), config.batches.batch_size
    data, model, microbatches = config.mesh.data, config.mesh.model, config.optimizer.microbatches
    # Devices of a process are adjacent, and so are its rows of a batch.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if max(data, 1) * model > len(devices):
        raise UserError(
            f"config.mesh.data is {data} and config.mesh.model {model}, but there are "
            f"{len(devices)} devices here: lower them, or set data to 0 to use all useful devices"
        )
    if config.model.hidden_size % model:
        raise UserError(
            f"config.mesh.model is {model}: it must divide model.hidden_size, "
            f"{config.model.hidden_size}"
        )
    if not data:
        usable = len(devices) // model
        if devices[0].platform == "cpu":  # There may be fewer if JAX had started before.
            # All processes must choose the same, and the library may run only in some of them.
            count = _count_useful_cores if processes == 1 else _limit_cores
            usable = min(usable, count(config) * processes)
        shares = batch_size // (model * microbatches)
        fitting = [n for n in range(1, usable + 1) if n * model % processes == 0]
        data = max((n for n in fitting if shares % n == 0), default=max(fitting, default=1))
    parts = data * model * microbatches
    if batch_size % parts:
        raise UserError(
            f"config.batches.batch_size is {batch_size}: it must be a multiple of mesh.data times "
            f"mesh.model times optimizer.microbatches, {parts}"
        )
    if data * model % processes:
        raise UserError(
            f"config.mesh.data times config.mesh.model is {data * model}: {processes} processes "
            f"with {len(devices) // processes} devices each can't share that equally; choose a "
            "multiple of the number of processes"
        )
    used = np.array(devices).reshape(processes, -1)[:, : data * model // processes]
    return Mesh(used.reshape(data, model), (DATA, MODEL))


def get_storage_spec(array: jax.Array, mesh: Mesh) -> PartitionSpec:
    """Return the spec for storing an array of the training state, by its shape.

    A matrix is divided along its largest divisible axis over `MODEL`; other arrays are replicated.
    So the optimizer state of a parameter is divided as the parameter is.
    """
    shape, number = array.shape, mesh.shape[MODEL]
    axes = [axis for axis, size in enumerate(shape) if size % number == 0]
    if number == 1 or len(shape) < 2 or not axes:
        return EVERYWHERE
    return PartitionSpec(*[None] * max(axes, key=lambda axis: shape[axis]), MODEL)


def place(tree: T, mesh: Mesh, spec: PartitionSpec | None = None) -> T:
    """Place the arrays of a tree on the devices of a mesh, by default as `get_storage_spec` says.

    If the mesh has devices of other processes, all processes pass the same whole arrays.
    """

    def put(array: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, get_storage_spec(array, mesh) if spec is None else spec)
        if sharding.is_fully_addressable or not array.is_fully_addressable:
            return jax.device_put(array, sharding)
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(array)))
        whole = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: whole[part])

    return jax.tree.map(put, tree)


def place_local(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Place arrays on the devices of a mesh, from the part that each process holds."""
    parts = jax.tree.map(np.asarray, tree)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), parts)


def gather_on_one_device(tree: T, mesh: Mesh) -> T:
    """Return whole arrays on this process's first device; replicated ones are not copied."""
    replicate = jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, EVERYWHERE))

    def whole(array: jax.Array) -> jax.Array:
        return (array if array.is_fully_replicated else replicate(array)).addressable_data(0)

    return jax.tree.map(whole, tree)


def get_one_copy(array: jax.Array) -> jax.Array:
    """Return one copy of an array that this process's devices, and no others, each hold whole.

    Any other array is returned as it is.
    """
    has_copies = array.is_fully_replicated and array.is_fully_addressable
    return array.addressable_data(0) if has_copies else array


def divide_over_devices(
    compute_grads: Callable[..., Any], params: object, mesh: Mesh
) -> Callable[..., Any]:
    """Return a function like `compute_grads(params, key, batch, carry, masks)`, for a whole mesh.

    Its parameters are as stored on the mesh; batch, carry and masks are divided over the devices.
    It returns the means of grads and loss over all devices, divided for storage; and the carry.
    """
    if mesh.size == 1:
        return compute_grads  # A collective operation would copy all gradients.
    specs = jax.tree.map(lambda array: get_storage_spec(array, mesh), params)

    def gather(part: jax.Array, spec: PartitionSpec) -> jax.Array:
        if spec == EVERYWHERE:
            return part
        return jax.lax.all_gather(part, MODEL, axis=len(spec) - 1, tiled=True)

    def compute_mean_grads(params: Any, key: jax.Array | None, *divided: Any) -> Any:
        means, carry = compute_grads(jax.tree.map(gather, params, specs), key, *divided)
        return mean_over_devices(means, (specs, EVERYWHERE)), carry

    return jax.shard_map(
        compute_mean_grads,
        mesh=mesh,
        in_specs=(specs, EVERYWHERE, DIVIDED, DIVIDED, DIVIDED),
        out_specs=((specs, EVERYWHERE), DIVIDED),
        check_vma=False,  # Without its check of which results are replicated.
    )


def mean_over_devices(tree: T, specs: object) -> T:
    """Return means over all devices, or this device's part of them; call it in `shard_map`."""
    # Between processes on CPUs, gloo's reduce-scatter sometimes returns wrong sums of arrays of
    # megabytes (jax-ml/jax#40830).
    scatters = jax.default_backend() != "cpu" or jax.process_count() == 1

    def part(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        if spec == EVERYWHERE:
            return jax.lax.pmean(array, (DATA, MODEL))
        axis, number = len(spec) - 1, jax.lax.axis_size(MODEL)
        if scatters:
            parts = jax.lax.psum_scatter(array, MODEL, scatter_dimension=axis, tiled=True)
            return jax.lax.pmean(parts, DATA) / number
        whole, size = jax.lax.pmean(array, (DATA, MODEL)), array.shape[axis] // number
        begin = jax.lax.axis_index(MODEL) * size
        return jax.lax.dynamic_slice_in_dim(whole, begin, size, axis)

    return jax.tree.map(part, tree, specs)
