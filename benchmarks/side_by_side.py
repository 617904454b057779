"""Time the same work in several libraries, in one process each, one run at a time.

All processes start first and wait; then the rounds alternate between them. So other load on the
machine affects all libraries equally, and none uses the thread pools or freed memory of another.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from frame import parse_flags, print_head, print_row


class Work(NamedTuple):
    """The work of a contestant, created in its own process."""

    run: Callable[[], object]  # Does the work once and waits for the result.
    device: str  # "cpu", or the accelerator's name.
    runs_per_turn: int = 1  # More than one for short work.
    flops: int = 0  # Operations of a run, for the work that measures the peak.


def parse_options(description: str | None, **sizes: Any) -> argparse.Namespace:
    """Parse the command line: a flag for each size, and the common ones.

    --dtype is that of matmuls, float32 or bfloat16; --only names contestants by words in their
    names, as in fused,torch.
    """
    return parse_flags(description, **sizes, rounds=5, dtype="float32", only="")


def measure(
    contestants: Mapping[str, Callable[[], Work]], options: argparse.Namespace
) -> dict[str, tuple[Work, list[float]]]:
    """Run all contestants that can run here; print the others, with the reasons.

    Args:
      contestants: picklable functions that make the work, by name. The first one always runs;
        contestants that run on another kind of device are skipped.
      options: from `parse_options`.

    Returns:
      The work of each contestant, without `run`, and the seconds of each run.
    """
    # Otherwise the first process allocates most of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    context = multiprocessing.get_context("spawn")
    words = options.only.lower().split(",")
    pipes: dict[str, Connection] = {}
    works: dict[str, Work] = {}
    for name, make in contestants.items():
        if pipes and not any(word in name.lower() for word in words):
            continue
        pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make), daemon=True).start()
        theirs.close()  # So that `recv` fails if the process dies.
        try:
            work = pipe.recv()
        except EOFError:
            work = "its process died"
        if isinstance(work, str):
            print(f"{name} is skipped: {work}", flush=True)
            continue
        if not works:
            print_machine(work.device, options)
            on_cpu = work.device == "cpu"
        if (work.device == "cpu") != on_cpu:
            print(f"{name} is skipped: it runs on {work.device}", flush=True)
            pipe.close()
            continue
        pipes[name], works[name] = pipe, work

    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send(works[name].runs_per_turn)
            seconds[name] += pipe.recv()
    for pipe in pipes.values():
        pipe.send(0)
    return {name: (works[name], seconds[name]) for name in pipes}


def _serve(pipe: Connection, make: Callable[[], Work]) -> None:
    """Make the work in a contestant's process; run it when the pipe requests it."""
    try:
        work = make()
        for _ in range(2):
            work.run()
    except Exception as error:  # The library is not installed, or does not support this device.
        message = str(error).partition("\n")[0]
        pipe.send(f"{type(error).__name__}: {message}")
        return
    pipe.send(work._replace(run=_nothing))
    try:
        while runs := pipe.recv():
            pipe.send([_time(work.run) for _ in range(runs)])
    except (EOFError, KeyboardInterrupt):
        pass  # The benchmark was interrupted.


def _nothing() -> None:
    """Replace `Work.run`, which can't leave its process."""


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_machine(device: str, options: argparse.Namespace) -> None:
    """Print the machine, the libraries and the flags."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax")]
    print(
        f"{device}, {(models or [platform.processor()])[0]}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {', '.join(libraries)}\n"
        f"{' '.join(f'--{name}={value}' for name, value in vars(options).items() if value)}\n",
        flush=True,
    )


def print_table(
    measurements: Mapping[str, tuple[Work, list[float]]],
    ours: str,
    rate_name: str,
    rate: Callable[[float], str],
) -> None:
    """Print times, the median divided by that of `ours`, and a rate made from the median."""
    print_head("", "median ms", "min", "max", f"/ {ours}", rate_name)
    baseline = statistics.median(measurements[ours][1]) if ours in measurements else float("nan")
    for name, (_, seconds) in measurements.items():
        median = statistics.median(seconds)
        times = (f"{1000 * x:,.1f}" for x in (median, min(seconds), max(seconds)))
        print_row(name, *times, f"{median / baseline:.2f}", rate(median))


def jax_device() -> str:
    """Return the device that JAX runs on, for `Work`."""
    import jax

    return jax.devices()[0].device_kind


def torch_device() -> tuple[Any, str]:
    """Set up PyTorch like the others; return its device, and the name for `Work`."""
    import torch

    torch.set_num_threads(os.cpu_count())
    if not torch.cuda.is_available():
        return torch.device("cpu"), "cpu"
    # JAX and TensorFlow multiply float32 in TF32 on GPUs that support it.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda"), torch.cuda.get_device_name()


def keras_device(dtype: str) -> str:
    """Set the dtype of new Keras layers; return the device for `Work`."""
    import keras
    import tensorflow as tf

    keras.mixed_precision.set_global_policy("mixed_bfloat16" if dtype == "bfloat16" else dtype)
    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else "cpu"


def set_haiku_dtype(dtype: str) -> None:
    """Set the dtype of the matmuls of hk.LSTM and hk.Linear; parameters stay in float32."""
    import haiku as hk
    import jmp

    policy = jmp.get_policy(f"params=float32,compute={dtype},output=float32")
    for module in (hk.LSTM, hk.Linear):
        hk.mixed_precision.set_policy(module, policy)
