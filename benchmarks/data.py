"""Measure the cost of large texts: preparation, memory, and batches.

    python benchmarks/make_corpus.py --directory corpus --megabytes 1000
    python benchmarks/data.py --corpus corpus

Memory is the sampled sum of the resident pages of all processes.
"""

import argparse
import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[1]
# Short validation and test splits, so that the evaluation before the first step is short.
FRACTIONS = (0.9998, 0.0001, 0.0001)
_PREPARE = """
import sys
from lstm_jax import config
from lstm_jax.data import prepared
data = config.default().data
data.path, data.prepared, data.fractions = sys.argv[1], sys.argv[2], {fractions}
prepared.prepare_corpus(data)
"""


def main() -> None:
    """Measure and print preparation, loading, memory, and steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="A directory of text files.")
    parser.add_argument("--train_seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    path = f"{options.corpus}/*.txt"
    megabytes = sum(file.stat().st_size for file in options.corpus.glob("*.txt")) / 1e6
    with tempfile.TemporaryDirectory(dir=options.corpus) as scratch:
        _measure_preparation(path, f"{scratch}/prepared", megabytes)
        data = _data(path, f"{scratch}/prepared")
        _measure_loading(data)
        _measure_memory(path, scratch, options.train_seconds)
        _measure_steps(data, options.rounds)


def _data(path: str, prepared: str) -> ConfigDict:
    from lstm_jax import config

    data = config.default().data
    data.path, data.prepared, data.fractions = path, prepared, FRACTIONS
    return data


def _measure_preparation(path: str, prepared: str, megabytes: float) -> None:
    script = _PREPARE.format(fractions=FRACTIONS)
    process = subprocess.Popen([sys.executable, "-c", script, path, prepared], cwd=ROOT)
    began = time.perf_counter()
    peak = _peak(process, lambda: process.poll() is not None)
    seconds = time.perf_counter() - began
    assert process.returncode == 0
    print(
        f"preparation: {megabytes:,.0f} MB in {seconds:.1f} s with all imports, "
        f"{megabytes / seconds:.0f} MB/s on {os.cpu_count()} cores, peak {peak:,.0f} MB of memory",
        flush=True,
    )


def _peak(process: subprocess.Popen[bytes], is_over: Callable[[], bool]) -> float:
    """Return the peak memory of a process and its children until `is_over`, in 10**6 bytes."""
    peak = 0
    while not is_over():
        peak = max(peak, sum(map(_resident, [process.pid, *_children(process.pid)])))
        time.sleep(0.02)
    return peak / 1e6


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def _measure_loading(data: ConfigDict) -> None:
    from lstm_jax import batches, config
    from lstm_jax.data import texts

    train = texts.load_texts(data).texts["train"]
    ids = train.encode(train.vocabulary(data))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for kind in ("windows", "streams"):
        fields = config.default().batches
        fields.kind = kind
        iterator, _ = batches.make_batches(ids, fields, seed=0)
        rates = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(500):
                next(iterator)
            rates.append(500 * 64 * 100 / (time.perf_counter() - began))
        print(
            f"loading {kind}: {statistics.median(rates) / 1e6:.1f} million characters/s on a core",
            flush=True,
        )
    os.sched_setaffinity(0, cores)


def _measure_memory(path: str, scratch: str, seconds: float) -> None:
    peaks = {}
    for name, flags in {
        "Tiny Shakespeare": [],
        "the corpus": [
            f"--config.data.path={path}",
            f"--config.data.prepared={scratch}/prepared",
            f"--config.data.fractions={','.join(map(str, FRACTIONS))}",
        ],
    }.items():
        command = [
            *(sys.executable, "-m", "lstm_jax.main", "--config=experiments/quick.py"),
            f"--workdir={scratch}/{name.split()[-1]}",
            *flags,
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        began: list[float] = []

        def watch(output: Any = process.stdout, began: list[float] = began) -> None:
            for line in output:
                if line.startswith(b"=== untrained"):
                    began.append(time.monotonic())

        threading.Thread(target=watch, daemon=True).start()

        def is_over(began: list[float] = began) -> bool:
            return bool(began) and time.monotonic() > began[0] + seconds

        peaks[name] = _peak(process, is_over)
        process.send_signal(signal.SIGKILL)
        process.wait()
    printed = ", ".join(f"{peak:,.0f} MB on {name}" for name, peak in peaks.items())
    print(f"training quick.py, peak memory: {printed}", flush=True)


def _measure_steps(data: ConfigDict, rounds: int) -> None:
    from lstm_jax import config as config_lib

    quick = config_lib.default()
    quick.batches.kind = "streams"
    quick.batches.batch_size, quick.batches.window_length = 32, 96
    quick.model.embedding_size, quick.model.hidden_size = 64, 384
    tiny = config_lib.default()
    tiny.batches.batch_size, tiny.batches.window_length = 8, 32
    tiny.model.embedding_size, tiny.model.hidden_size = 8, 24
    for name, config, steps, per_call in (
        ("seed sizes", config_lib.default(), 1, 1),
        ("quick.py", quick, 10, 1),
        ("24 hidden units, batch of 8", tiny, 200, 1),
        ("24 hidden units, batch of 8, steps_per_call=10", tiny, 20, 10),
    ):
        ratios = _ratios(config, data, steps, per_call, rounds)
        printed = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
        print(f"time of a step with its data / on a constant batch, {name}: {printed}", flush=True)


def _ratios(
    config: ConfigDict, data: ConfigDict, calls: int, per_call: int, rounds: int
) -> dict[str, float]:
    """Return the median times of steps with their data, relative to a constant batch."""
    import jax

    from lstm_jax import batches, model, optimizer, train_step
    from lstm_jax.data import texts
    from lstm_jax.devices import feeding, memory, parallel

    parallel.use_cores(config)
    memory.keep_freed_memory()
    mesh = parallel.make_mesh(config)
    text = texts.load_texts(data).texts["train"]
    ids = text.encode(text.vocabulary(data))
    size = len(text.vocabulary(data))
    short = np.asarray(ids[:1_000_000])
    on_device, _ = batches.make_batches(short, config.batches, 0, only_offsets=True)
    from_files, _ = batches.make_batches(ids, config.batches, 0)
    feeds = {
        "on the device": feeding.Feed(on_device, mesh, feeding.place_text(short, size, mesh)),
        "from files": feeding.Feed(from_files, mesh, None),
    }
    lstm = model.make_model(config.model, size)
    adam = optimizer.make_optimizer(config.optimizer, total_steps=1)
    step = train_step.make_train_step(lstm, adam, config, mesh)
    state = train_step.init_state(lstm, adam, jax.random.key(0), config.batches.batch_size)
    state = state.place(mesh)
    constant = feeds["from files"].next(per_call)

    def run(read: Callable[[], Any]) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(calls):
            state = step(state, read())
        jax.block_until_ready(state)
        return time.perf_counter() - began

    readers: dict[str, Callable[[], Any]] = {"constant": lambda: constant}
    readers |= {name: functools.partial(feed.next, per_call) for name, feed in feeds.items()}
    for read in readers.values():
        run(read)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            seconds[name].append(run(read))
    base = seconds.pop("constant")
    # Compute ratios per round, because the machine's speed changes between rounds.
    return {
        name: statistics.median(a / b for a, b in zip(times, base, strict=True))
        for name, times in seconds.items()
    }


if __name__ == "__main__":
    main()
