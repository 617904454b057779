"""Train one model in many processes, on one machine or several.

All processes call the same functions in the same order. Process 0 writes the files of a run; all
take part in saving checkpoints.
"""

import contextlib
import functools
import importlib.util
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

from lstm_jax.background import call_in_thread
from lstm_jax.errors import UserError, make_visible, one_line


@contextlib.contextmanager
def join_processes(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: int,
) -> Iterator[None]:
    """Join the other processes of a run, if there are any, and leave together with them.

    Process 0 listens at `coordinator_address`, HOST:PORT. If the first three arguments are None,
    they come from SLURM, Open MPI, Kubernetes or Cloud TPU. Call it before anything else uses JAX
    but `parallel.use_cores`. An exception within the block ends this process immediately, so that
    no other process waits for it.

    Raises:
      UserError: if an argument is missing, or the processes don't find each other.
    """
    given, is_cluster = (coordinator_address, num_processes, process_id), _is_in_a_cluster()
    if num_processes == 1 or (given == (None, None, None) and not is_cluster):
        yield
        return
    if None in given and not is_cluster:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: set all three"
        )
    # Training handles SIGTERM itself. On CPUs, gloo exchanges the arrays.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        initialize = functools.partial(
            jax.distributed.initialize,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=30,  # After this silence a process counts as lost.
            shutdown_timeout_seconds=60,
        )
        call_in_thread(initialize, *given)  # So that Ctrl-C ends the wait for the others.
    except Exception as error:  # Detecting a cluster may raise anything.
        raise UserError(
            f"can't join the other processes ({one_line(error)}): start all of them within "
            "--join_seconds of each other, or train alone with --num_processes=1"
        ) from None
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


def _is_in_a_cluster() -> bool:
    """Return whether the environment names other processes, in one of the ways that JAX reads."""
    env = os.environ
    # A shell in a SLURM allocation is not one of its tasks, and has no list of nodes.
    slurm = env.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in env else "1"
    if slurm != "1" or env.get("OMPI_COMM_WORLD_SIZE", "1") != "1" or "JOB_COMPLETION_INDEX" in env:
        return True
    return "," in env.get("TPU_WORKER_HOSTNAMES", "") or _is_in_a_tpu_pod()


def _is_in_a_tpu_pod() -> bool:
    """Return whether the metadata server names other Cloud TPU machines."""
    if importlib.util.find_spec("libtpu") is None or "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    import requests

    url = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    try:
        answer = requests.get(
            f"{url}worker-network-endpoints", headers={"Metadata-Flavor": "Google"}, timeout=5
        )
    except requests.RequestException:
        return False
    return answer.ok and "," in answer.text


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
        traceback.print_exception(error)
        message = (
            f"process {jax.process_index()} failed ({one_line(error)[:300]}): if another process "
            "has ended, see its output; start all with the same command to resume"
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


def check_same(text: str, what: str) -> None:
    """Raise `UserError` in all processes if their texts differ; `what` is for the message."""
    checksum = np.int32(zlib.crc32(text.encode("utf-8", "surrogateescape")) >> 1)
    checksums = multihost_utils.process_allgather(checksum)
    if (checksums != checksum).any():
        raise UserError(f"the processes of this run don't have the same {what}")
