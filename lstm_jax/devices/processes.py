"""Run in several processes, on one machine or more, or in one.

All processes call the same functions in the same order. Process 0 writes the files of a run; all
take part in saving checkpoints.
"""

import contextlib
import os
import sys
import traceback
import zlib
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lstm_jax.errors import UserError, make_visible, one_line


@contextlib.contextmanager
def join_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Join the other processes of a run with `jax.distributed`, and leave together with them.

    Process 0 listens at `coordinator_address`, HOST:PORT. What is None, JAX gets from SLURM, Open
    MPI, Kubernetes or Cloud TPU. Call it before anything else uses JAX but `setup.use_cores`. An
    exception within the block ends this process immediately, so that no other process waits for it.
    Raise `UserError` if an argument is missing, or the processes don't find each other.
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
    sharding = NamedSharding(Mesh(jax.devices(), "all"), PartitionSpec("all"))
    ones = jax.make_array_from_process_local_data(sharding, np.ones(jax.local_device_count()))
    jax.block_until_ready(jax.jit(jax.numpy.sum)(ones))


def _leave(error: BaseException) -> NoReturn:
    """End this process without waiting for the others, which detect that it has ended."""
    message = str(error)
    # The end of another process is a JaxRuntimeError, wherever this one notices it.
    if not isinstance(error, UserError | jax.errors.JaxRuntimeError):
        traceback.print_exception(error)
    if not isinstance(error, UserError):
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


@contextlib.contextmanager
def main_process_first(name: str) -> Iterator[None]:
    """Let process 0 run the block, which may take long, before all other processes do."""
    if jax.process_count() > 1:
        # On CPUs, processes connect when they first wait for each other, for at most 30 seconds;
        # later they wait for at most 30 minutes.
        _wait_for_devices()
        multihost_utils.sync_global_devices(f"{name}, connected")
    if not is_first():
        multihost_utils.sync_global_devices(name)
    yield
    if is_first():
        multihost_utils.sync_global_devices(name)


def max_over_processes(value: int) -> int:
    """Return the maximum of a value over all processes, which call this at the same step."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def check_same(run: str) -> None:
    """Raise `UserError` in all processes if they describe their runs differently."""
    checksum = np.int32(zlib.crc32(run.encode("utf-8", "surrogateescape")) >> 1)
    if (multihost_utils.process_allgather(checksum) != checksum).any():
        raise UserError(
            "the processes don't have the same config, text or working directory: start all with "
            "the same command"
        )
