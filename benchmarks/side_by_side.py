"""Time the same work in several libraries, in one process each, one run at a time.

All processes start first and wait; then the rounds alternate between them. So other load on the
machine affects all libraries equally, and none uses the thread pools or freed memory of another.
All keep the memory that a run frees for the next (lstm_jax/devices/setup.py).
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from frame import parse_flags, print_head, print_row, time_call
from lstm_jax.devices import setup
from lstm_jax.ops.processor import count_cores


class Work(NamedTuple):
    """The work of a contestant, created in its own process."""

    run: Callable[[], object]  # Does the work once and waits for the result.
    device: str  # "cpu", or the name of an accelerator.
    runs_per_turn: int = 1  # More than one for short work.
    units: int = 1  # The seconds of a run are divided by this number.


class Times(NamedTuple):
    """The times of a run, in seconds."""

    seconds: float
    cpu: float  # Of all threads of the process, those that only wait in a loop, too.


Make = Callable[[argparse.Namespace], Work]


def parse_options(description: str | None, **sizes: Any) -> argparse.Namespace:
    """Parse the command line: a flag for each size, and the common ones.

    --dtype is that of matmuls, float32 or bfloat16; --only names contestants by words in their
    names, as in auto,torch.
    """
    sizes |= {"embedding_size": 256, "hidden_size": 1024, "num_layers": 1, "vocabulary_size": 67}
    return parse_flags(description, **sizes, rounds=5, dtype="float32", only="")


def measure(contestants: Mapping[str, Make], options: argparse.Namespace) -> dict[str, list[Times]]:
    """Run all contestants that can run here; print the others, with the reasons.

    Args:
      contestants: picklable functions that make the work, by name. The first one always runs;
        contestants that run on another kind of device are skipped.
      options: from `parse_options`.

    Returns:
      The times of each run of each contestant.
    """
    # Otherwise the first process allocates most of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    context = multiprocessing.get_context("spawn")
    words = options.only.lower().split(",")
    pipes: dict[str, Connection] = {}
    for name, make in contestants.items():
        if pipes and not any(word in name.lower() for word in words):
            continue
        pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, options), daemon=True).start()
        theirs.close()  # So that `recv` fails if the process dies.
        try:
            device, reason = pipe.recv()
        except EOFError:
            device, reason = "", "its process died"
        if device and not pipes:
            print_machine(device, options)
            on_cpu = device == "cpu"
        elif device and (device == "cpu") != on_cpu:
            reason = f"it runs on {device}"
        if reason:
            print(f"{name} is skipped: {reason}", flush=True)
        else:
            pipes[name] = pipe

    times: dict[str, list[Times]] = {name: [] for name in pipes}
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send("run")
            times[name] += pipe.recv()
    return times


def _serve(pipe: Connection, make: Make, options: argparse.Namespace) -> None:
    """Make the work in a contestant's process; run it when the pipe requests it."""
    try:
        work = make(options)
        setup.keep_freed_memory()
        for _ in range(2):
            work.run()
    except Exception as error:  # The library is not installed, or does not support this device.
        message = str(error).partition("\n")[0]
        pipe.send(("", f"{type(error).__name__}: {message}"))
        return
    pipe.send((work.device, ""))
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # At the end of the benchmark.
        while pipe.recv():
            pipe.send([time_work(work) for _ in range(work.runs_per_turn)])


def time_work(work: Work) -> Times:
    """Run the work once, and return its times."""
    began = time.process_time()
    seconds = time_call(work.run)
    return Times(seconds / work.units, (time.process_time() - began) / work.units)


def print_machine(device: str, options: argparse.Namespace) -> None:
    """Print the machine, the libraries and the flags."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    names = ("jax", "jaxlib", "flax", "equinox", "torch")
    libraries = sorted(f"{d.name} {d.version}" for d in distributions() if d.name in names)
    print(
        f"{device}, {(models or [platform.processor()])[0]}, {count_cores()} cores, load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {', '.join(libraries)}\n"
        f"{' '.join(f'--{name}={value}' for name, value in vars(options).items() if value)}\n",
        flush=True,
    )


def print_table(
    measurements: Mapping[str, list[Times]], rate_name: str, rate: Callable[[float], str]
) -> None:
    """Print times, the medians divided by those of the first row, and a rate of the median."""
    first = next(iter(measurements))
    print_head("", "median ms", "min", "max", f"/ {first}", "CPU time", rate_name)
    baseline = find_medians(measurements[first])
    for name, runs in measurements.items():
        medians, seconds = find_medians(runs), [run.seconds for run in runs]
        times = (f"{1000 * x:,.1f}" for x in (medians.seconds, min(seconds), max(seconds)))
        ratios = (f"{x / y:.2f}" for x, y in zip(medians, baseline, strict=True))
        print_row(name, *times, *ratios, rate(medians.seconds))


def find_medians(runs: Sequence[Times]) -> Times:
    """Return the medians of the times of runs."""
    return Times(*map(statistics.median, zip(*runs, strict=True)))


def torch_device() -> Any:
    """Set up PyTorch like the others; return its device."""
    import torch

    torch.set_num_threads(count_cores())
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # JAX multiplies float32 in TF32 on GPUs that support it.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")
