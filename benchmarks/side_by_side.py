"""Time the same work in several libraries, in one process each, one run at a time.

All processes start first and wait; then the rounds alternate between them. So other load on the
machine affects all libraries equally, and none uses the thread pools or freed memory of another.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

_ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Otherwise the first process allocates most of a GPU's memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}
_LIBRARIES = ("jax", "jaxlib", "flax", "dm-haiku", "torch", "keras", "tensorflow", "tensorflow-cpu")


class Work(NamedTuple):
    """The work of a contestant, created in its own process.

    Attributes:
      run: does the work once and waits for the result.
      device: "cpu", or the accelerator's name.
      compile_seconds: the time for tracing and compiling, in JAX.
      temporary_bytes: memory that the compiled program allocates, without arguments and results.
      runs_per_turn: the number of runs, more than one for short work.
      flops: operations of a run, for the work that measures the peak.
    """

    run: Callable[[], object]
    device: str
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    runs_per_turn: int = 1
    flops: int = 0


class Measurement(NamedTuple):
    """The measurements of one contestant.

    Attributes:
      work: its work without `run`, which stays in its process.
      seconds: the time of each run, in order.
      peak_bytes: the peak resident memory of its process, libraries and compilation included.
    """

    work: Work
    seconds: list[float]
    peak_bytes: int


def parse_options(description: str | None, **sizes: int) -> argparse.Namespace:
    """Parse the command line: an option for each size, and the common options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {**sizes, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[default: {default}]")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the dtype of matmuls [default: float32]",
    )
    parser.add_argument(
        "--only",
        default="",
        help="run contestants whose names contain one of these words, as in: fused,torch",
    )
    return parser.parse_args()


def measure(
    contestants: Mapping[str, Callable[[], Work]], options: argparse.Namespace
) -> dict[str, Measurement]:
    """Run all contestants that can run here; print the others, with the reasons.

    Args:
      contestants: picklable functions that make the work, by name. The first one always runs;
        contestants that run on another kind of device are skipped.
      options: from `parse_options`.

    Returns:
      The measurements, in the order of the contestants.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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
            _print_header(work.device, options)
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
    measurements = {}
    for name, pipe in pipes.items():
        pipe.send(0)
        measurements[name] = Measurement(works[name], seconds[name], pipe.recv())
    return measurements


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
        pipe.send(_peak_bytes())
    except (EOFError, KeyboardInterrupt):
        pass  # The benchmark was interrupted.


def _nothing() -> None:
    """Replace `Work.run`, which can't leave its process."""


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _print_header(device: str, options: argparse.Namespace) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    versions = []
    for library in _LIBRARIES:
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    print(
        f"{'' if device == 'cpu' else device + ', '}{processor}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {', '.join(versions)}\n"
        f"{' '.join(f'--{name}={value}' for name, value in vars(options).items() if value)}",
        flush=True,
    )


def print_table(
    measurements: Mapping[str, Measurement],
    ours: str,
    rate_name: str,
    rate: Callable[[float], str],
) -> None:
    """Print a Markdown table.

    Args:
      measurements: by contestant.
      ours: the contestant whose median divides all medians.
      rate_name: the header of a column.
      rate: returns the text of that column from the median in seconds.
    """
    print(f"\n| | median ms | min | max | / {ours} | {rate_name} | compile s | temp MB | RSS MB |")
    print("| --- |" + " ---: |" * 8)
    baseline = statistics.median(measurements[ours].seconds) if ours in measurements else None
    for name, (work, seconds, peak_bytes) in measurements.items():
        median = statistics.median(seconds)
        cells = (
            name,
            *(f"{1000 * x:,.1f}" for x in (median, min(seconds), max(seconds))),
            "-" if baseline is None else f"{median / baseline:.2f}",
            rate(median),
            "-" if work.compile_seconds is None else f"{work.compile_seconds:.2f}",
            "-" if work.temporary_bytes is None else f"{work.temporary_bytes / 1e6:,.0f}",
            f"{peak_bytes / 1e6:,.0f}",
        )
        print(f"| {' | '.join(cells)} |")
    print(
        f"\n/ {ours}: the median divided by that of {ours}; above 1 is slower. temp: memory that "
        "the compiled program allocates.\nRSS: the peak resident memory of the process, including "
        "libraries and compilation."
    )


def compile_jax(function: Any, *args: Any) -> tuple[Any, float, int]:
    """Compile a jitted function for arguments; return it with seconds and temporary bytes."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    return compiled, seconds, compiled.memory_analysis().temp_size_in_bytes


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
