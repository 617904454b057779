"""Many processes, on one machine or many, that train one model: started, in step, and told apart.

Each process calls the same functions in the same order. The first of them, process 0, writes what
a run leaves behind; all take part in checkpoints.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lstm_jax.errors import UserError, one_line

# A process that was silent for so long is lost. JAX ends all others then.
_HEARTBEAT_SECONDS = 30
# How long the processes may be apart at their end.
_SHUTDOWN_SECONDS = 60

_LOST = (
    "another process of this run has ended or can't be reached (what it said stands in its own "
    "output): start the same command for all of them, and it goes on from the last checkpoint"
)
# What JAX's errors hold when a process is gone.
_SIGNS = "Gloo|NCCL|[Cc]oordination|[Hh]eartbeat|[Bb]arrier|Connection (closed|reset)"

# Reads what native code says on standard error. When JAX ends the process, it writes dozens of
# lines, of which a user needs one.
_FILTER = """
import sys
for line in sys.stdin.buffer:
    text = line.decode(errors="replace")
    if "coordination" in text or "JAX distributed service" in text:
        ended = "Terminating process" in text or any(
            b"Terminating process" in later for later in sys.stdin.buffer)
        if ended:
            print(sys.argv[1], file=sys.stderr, flush=True)
        break
    if not text.startswith("[Gloo]"):
        sys.stderr.write(text)
        sys.stderr.flush()
for line in sys.stdin.buffer:
    pass
"""


@contextlib.contextmanager
def join_processes(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: int,
) -> Iterator[None]:
    """Joins the other processes of a run, if there are any, and leaves with them.

    Where none of the first three is given, SLURM, Open MPI, Kubernetes or Cloud TPU say who they
    are. It must be called before anything else uses JAX, and starts none of its devices. When
    something is raised within, this process ends at once, so that no other waits for it.

    Args:
      coordinator_address: host and port where process 0 listens.
      num_processes: of the run.
      process_id: of this one, from 0.
      timeout_seconds: how long to wait for the others.

    Raises:
      UserError: if they can't be joined.
    """
    given = (coordinator_address, num_processes, process_id)
    if num_processes == 1 or (given == (None, None, None) and not _is_started_by_a_cluster()):
        yield
        return
    _check(*given)
    # SIGTERM is for this program, which saves; and gloo is what CPUs exchange arrays by.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _filter_native_errors()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as error:  # Whatever the cluster's own detection raises, too.
        _leave(
            f"can't join the other processes ({one_line(error)[:300]}): name them with "
            "--coordinator_address, --num_processes and --process_id, start all of them within "
            "--join_seconds of each other, or train alone with --num_processes=1"
        )
    try:
        yield
        _finish()
    except UserError as error:
        _leave(_LOST if re.search(_SIGNS, str(error)) else str(error))
    except Exception as error:
        if re.search(_SIGNS, str(error)):
            _leave(_LOST)
        if isinstance(error, BrokenPipeError):  # The reader (`| head`) has had enough.
            _leave("nobody reads the output any more")
        if "RESOURCE_EXHAUSTED" not in str(error):
            traceback.print_exc()
        _leave(f"process {jax.process_index()} failed: {one_line(error)[:300]}")
    except BaseException as error:
        _leave("interrupted", 130 if isinstance(error, KeyboardInterrupt) else 2)
    jax.distributed.shutdown()


def _is_started_by_a_cluster() -> bool:
    """Whether the environment names other processes, in one of the ways that JAX knows."""
    env = os.environ
    # A shell within an allocation of SLURM is no task of it, and has no list of nodes.
    slurm = env.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in env else "1"
    if slurm != "1" or env.get("OMPI_COMM_WORLD_SIZE", "1") != "1" or "JOB_COMPLETION_INDEX" in env:
        return True
    return "," in env.get("TPU_WORKER_HOSTNAMES", "") or _is_on_a_tpu_pod()


def _is_on_a_tpu_pod() -> bool:
    """Whether this is a Cloud TPU machine that has others beside it, by its metadata server."""
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


def _check(address: str | None, number: int | None, process: int | None) -> None:
    """Raises `UserError` for flags that can't be meant."""
    if address is not None and not re.fullmatch(r".+:[0-9]+", address):
        raise UserError(
            f"--coordinator_address is {address!r}: it must be HOST:PORT, for example "
            "localhost:9911"
        )
    if number is not None and number < 1:
        raise UserError(f"--num_processes is {number}: it must be 1 or more")
    if process is not None and not 0 <= process < (number or process + 1):
        raise UserError(
            f"--process_id is {process}: it must be from 0 to one less than --num_processes"
            f"{'' if number is None else f', {number - 1}'}"
        )
    if None in (address, number, process) and not _is_started_by_a_cluster():
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three"
        )


def _filter_native_errors() -> None:
    """Lets only this program's Python write to standard error, and a filter what libraries do."""
    sys.stderr.flush()
    terminal = os.dup(2)
    command = [sys.executable, "-c", _FILTER, f"error: {_LOST}"]
    # In a session of its own, where Ctrl-C does not reach it.
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", 1, "utf-8", "backslashreplace")


def _finish() -> None:
    """Returns when each device of each process has done all that it was given.

    `sync_global_devices` waits for the first device of each process. Where another is behind, it
    may wait for a process that has left, and then Python can't end.
    """
    devices = Mesh(jax.devices(), "all")
    ones = jax.make_array_from_callback(
        (devices.size,), NamedSharding(devices, PartitionSpec("all")), lambda part: np.ones(1)
    )
    everywhere = NamedSharding(devices, PartitionSpec())
    jax.block_until_ready(jax.jit(jax.numpy.sum, out_shardings=everywhere)(ones))


def _leave(message: str, code: int = 2) -> NoReturn:
    """Ends this process without waiting for the others, which notice that it is gone."""
    if message == _LOST:  # JAX may notice at the same time: the filter tells it once.
        os.write(2, b"coordination: Terminating process\n")
    else:
        print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this process writes what the run leaves behind."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come to this point, whose name it is."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_goes_ahead(name: str) -> Iterator[None]:
    """A block that process 0 runs before all others."""
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def get_greatest(*values: int) -> tuple[int, ...]:
    """The greatest of each value among all processes, which call this at the same step."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.array(values, np.int32)).max(axis=0).tolist())


def check_same(text: str, what: str) -> None:
    """Raises `UserError`, on all processes, if they don't all give the same text."""
    digest = np.frombuffer(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), "u1")
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(digest)
        if (digests != digests[0]).any():
            raise UserError(f"the processes of this run don't have the same {what}")
