"""Train on many devices, of one process or several, on one machine or more.

Devices share the batch, and each holds all parameters. This suits recurrent layers of any kind:
with tensor parallelism, devices would have to exchange the hidden state at every position of the
window. `Feed` gives them batches, cut on the devices from a text that fits, or else copied there in
advance.

All processes call the same functions in the same order. Process 0 writes the files of a run; all
take part in saving checkpoints.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lstm_jax import model as model_lib
from lstm_jax.batches import Batch, Order, cut_batch, make_batches
from lstm_jax.config import Config
from lstm_jax.errors import UserError, make_visible, one_line
from lstm_jax.ops import choice
from lstm_jax.ops.processor import count_cores
from lstm_jax.vocabulary import Ids

T = TypeVar("T")

DATA = "data"  # The name of the mesh axis.
EVERYWHERE, DIVIDED = PartitionSpec(), PartitionSpec(DATA)

# Sizes for which dividing a batch over CPU cores is faster than using all cores for each matmul, in
# `benchmarks/train_step.py` on two cores. Matmuls of smaller layers end before threads can share
# them; larger layers read each kernel from memory once per device. The library divides the work of
# a layer itself, so that devices need not exchange gradients.
_SMALLEST_HIDDEN, _LARGEST_HIDDEN, _LARGEST_HIDDEN_IN_C = 64, 768, 448
_SMALLEST_PART = 16
_SHARE = 1 / 8  # Fraction of a GPU's or TPU's memory that a text may take.


def use_cores(config: Config, least: int = 1) -> None:
    """Set the number of CPU devices that training with `config` may need, or `least` if it is more.

    The number is an upper bound: it is unknown, until devices exist, how many other processes there
    are and whether the library in C runs. Call it before anything else uses JAX; later, or with a
    GPU or TPU, it has no effect.
    """
    wanted = config.mesh.data or _limit_cores(config)
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
    hidden_size, recurrence = config.model.hidden_size, config.model.recurrence
    if hidden_size > _LARGEST_HIDDEN_IN_C and recurrence in ("auto", "c"):
        model = model_lib.make_model(dataclasses.replace(config.model, recurrence="auto"), 1)
        if model.runs_gated_layers and choice.runs_in_c(
            "windows", model.dtype, hidden_size, gating=model.gating.name
        ):
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
    """Return the mesh of the devices that train with `config`, with the axis `DATA`.

    Raises:
      UserError: if there are too few devices, or they can't share the batch equally.
    """
    processes, number = jax.process_count(), config.mesh.data
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    # Devices of a process are adjacent, and so are its rows of a batch.
    by_process = np.array(devices).reshape(processes, -1)
    rows = config.batches.batch_size // config.optimizer.microbatches
    if not number:
        usable = by_process.shape[1]
        if devices[0].platform == "cpu":  # There may be fewer if JAX had started before.
            # All processes must choose the same, and the library may run only in some of them.
            count = _count_useful_cores if processes == 1 else _limit_cores
            usable = min(usable, count(config))
        fitting = (n for n in range(usable, 0, -1) if rows % (n * processes) == 0)
        number = processes * next(fitting, 1)
    if number > len(devices) or number % processes or rows % number:
        raise UserError(
            f"{number} devices can't share a batch: --config.mesh.data must be a multiple of the "
            f"number of processes, {processes}; at most the number of devices, {len(devices)}; and "
            f"divide --config.batches.batch_size / --config.optimizer.microbatches, {rows}"
        )
    return Mesh(by_process[:, : number // processes].reshape(-1), DATA)


def place(tree: T, mesh: Mesh, spec: PartitionSpec = EVERYWHERE) -> T:
    """Place the arrays of a tree on the devices of a mesh.

    If the mesh has devices of other processes, all processes pass the same whole arrays.
    """
    sharding = NamedSharding(mesh, spec)

    def put(array: jax.Array) -> jax.Array:
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


def get_local_copy(tree: T) -> T:
    """Return arrays that every device holds, on this process's first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def divide_over_devices(compute_grads: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return a function like `compute_grads(params, key, batch, carry, masks)`, for a whole mesh.

    Batch, carry and masks are divided over the devices. It returns the means of grads and loss over
    all devices; and the carry.
    """
    if mesh.size == 1:
        return compute_grads  # A collective operation would copy all gradients.

    def compute_mean_grads(*arguments: Any) -> Any:
        means, carry = compute_grads(*arguments)
        return jax.lax.pmean(means, DATA), carry

    return jax.shard_map(
        compute_mean_grads,
        mesh=mesh,
        in_specs=(EVERYWHERE, EVERYWHERE, DIVIDED, DIVIDED, DIVIDED),
        out_specs=(EVERYWHERE, DIVIDED),
        check_vma=False,  # Without its check of which results are replicated.
    )


def fits_on_device(ids: Ids) -> bool:
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
        on_devices: bool = True,
        predictions: np.ndarray | None = None,
    ) -> None:
        """Copy the text, and the predictions of teachers (`cut_batch`), if they are cut there."""
        fields, part = config.batches, (jax.process_index(), jax.process_count())
        self._mesh, self._cut = mesh, None
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


@contextlib.contextmanager
def join_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Join the other processes of a run with `jax.distributed`, and leave together with them.

    Process 0 listens at `coordinator_address`, HOST:PORT. What is None, JAX gets from SLURM, Open
    MPI, Kubernetes or Cloud TPU. Call it before anything else uses JAX but `use_cores`. An
    exception within the block ends this process immediately, so that no other process waits for it.

    Raises:
      UserError: if an argument is missing, or the processes don't find each other.
    """
    # Training handles SIGTERM itself. On CPUs, gloo exchanges the arrays.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=30,  # After this silence a process counts as lost.
            shutdown_timeout_seconds=60,
        )
    except Exception as error:  # Detecting a cluster may raise anything.
        raise UserError(f"can't join the other processes: {one_line(error)}") from None
    try:
        if jax.default_backend() == "gpu":
            # One that has a program in its cache would not take part in autotuning it, and the
            # others would wait for its results.
            jax.config.update("jax_enable_compilation_cache", False)
        yield
        _wait_for_devices()
    except BaseException as error:
        _leave(error)
    jax.distributed.shutdown()


def _wait_for_devices() -> None:
    """Wait until each device of each process has finished its work.

    `sync_global_devices` waits for the first device of each process only. If another one is behind,
    it may wait for a process that has left, and then Python can't end.
    """
    divided = NamedSharding(Mesh(jax.devices(), "all"), PartitionSpec("all"))
    ones = jax.make_array_from_process_local_data(divided, np.ones(jax.local_device_count()))
    jax.block_until_ready(jax.jit(jax.numpy.sum)(ones))


def _leave(error: BaseException) -> NoReturn:
    """End this process without waiting for the others, which detect that it has ended."""
    message = str(error)
    if not isinstance(error, UserError):
        # The end of another process is such an error, wherever this one notices it.
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exception(error)
        reason = one_line(error).replace("Error dispatching computation: ", "")
        message = (
            f"process {jax.process_index()} failed ({reason[:300]}): if another process has ended, "
            "see its output; start all with the same command to resume"
        )
    print("error:", make_visible(message), file=sys.stderr, flush=True)
    os._exit(2)


def is_first() -> bool:
    """Return whether this process writes the files of the run."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Wait until every process has called this with the same name."""
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_process_first(name: str) -> Iterator[None]:
    """Let process 0 run the block, which may take long, before all other processes do."""
    if jax.process_count() > 1:
        # On CPUs, processes connect when they first wait for each other, for at most 30 seconds;
        # later they wait for at most 30 minutes.
        _wait_for_devices()
        wait_for_all(f"{name}, connected")
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def max_over_processes(value: int) -> int:
    """Return the maximum of a value over all processes, which call this at the same step."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


# In jaxlib 0.10.2, all-reduces between the CPU devices of a process deadlock, and XLA aborts it,
# if a step is dispatched while 32 computations are in flight on one of the devices.
_MOST_STEPS_AHEAD = 16


class Pacer:
    """Waits for the devices about once a second.

    JAX dispatches steps asynchronously and may be tens of them ahead of the device. A stop has to
    wait for all of them. Between the waits, processes may be at different steps. So they agree on
    signals and on checkpoints only after one. If a process has several CPU devices, the waits are
    at most 16 steps apart.
    """

    def __init__(self, step: int) -> None:
        """Start when `step` steps are done; wait for the next one."""
        self._step, self._steps, self._clock = step, 1, time.monotonic()
        devices = jax.local_devices()
        shared = len(devices) > 1 and devices[0].platform == "cpu"
        self._most = _MOST_STEPS_AHEAD if shared else sys.maxsize

    def wait(self, step: int, result: jax.Array) -> bool:
        """Wait for a result of the step if it is time to; return whether all processes are here."""
        if step - self._step < self._steps:
            return jax.process_count() == 1
        jax.block_until_ready(result)
        milliseconds = max_over_processes(int(1e3 * (time.monotonic() - self._clock)))
        steps = int(self._steps / max(milliseconds, 1) * 1e3)
        self._steps = min(max(steps, 1), self._most)
        self._step, self._clock = step, time.monotonic()
        return True


def check_same(run: str) -> None:
    """Raise `UserError` in all processes if they describe their runs differently."""
    checksum = np.int32(zlib.crc32(run.encode("utf-8", "surrogateescape")) >> 1)
    if (multihost_utils.process_allgather(checksum) != checksum).any():
        raise UserError(
            "the processes don't have the same config, text or working directory: start all with "
            "the same command"
        )
