"""Measure the cost of large texts: preparation, memory, and batches.

    python benchmarks/make_corpus.py --directory corpus --megabytes 1000
    python benchmarks/data.py --corpus corpus

Memory is the sampled sum of the resident pages of all processes.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from frame import ROOT, parse_flags
from lstm_jax import batches, model, optimizer, train_step
from lstm_jax import config as config_lib
from lstm_jax.data import texts
from lstm_jax.devices import feeding, memory, parallel

# Short validation and test splits, so that the evaluation before the first step is short.
FRACTIONS = (0.9998, 0.0001, 0.0001)
PREPARE = """
import sys
from lstm_jax import config
from lstm_jax.data import prepared
data = config.DataConfig(path=sys.argv[1], prepared=sys.argv[2], fractions={fractions})
prepared.prepare_corpus(data)
"""


def main() -> None:
    """Measure and print preparation, memory, loading, and steps."""
    options = parse_flags(__doc__, corpus=Path, train_seconds=30.0, rounds=15)
    files = list(options.corpus.glob("*.txt"))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    with tempfile.TemporaryDirectory(dir=options.corpus) as scratch:
        path, prepared = f"{options.corpus}/*.txt", f"{scratch}/prepared"
        data = config_lib.DataConfig(path=path, prepared=prepared, fractions=FRACTIONS)
        script = PREPARE.format(fractions=FRACTIONS)
        began = time.perf_counter()
        peak = measure_peak("-c", script, data.path, data.prepared)
        seconds = time.perf_counter() - began
        print(
            f"preparation: {megabytes:,.0f} MB in {seconds:.1f} s with all imports, "
            f"{megabytes / seconds:.0f} MB/s on {os.cpu_count()} cores, peak {peak:,.0f} MB"
        )
        quick = ("-m", "lstm_jax.main", "--config=experiments/quick.py", f"--workdir={scratch}/run")
        for name, fields in {
            "Tiny Shakespeare": [],
            "the corpus": [
                f"--config.data.path={data.path}",
                f"--config.data.prepared={data.prepared}",
                f"--config.data.fractions={','.join(map(str, FRACTIONS))}",
            ],
        }.items():
            peak = measure_peak(*quick, *fields, seconds=options.train_seconds)
            print(f"training quick.py on {name}: peak {peak:,.0f} MB", flush=True)
        measure_loading(data)
        measure_steps(data, options.rounds)


def measure_peak(*words: str, seconds: float | None = None) -> float:
    """Return the peak memory of a Python command and its children, in 10**6 bytes.

    With `seconds`, end it this time after it has printed a sample of the untrained model.
    """
    peak, end = 0, float("inf")
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=output)
        while process.poll() is None and time.monotonic() < end:
            peak = max(peak, resident(process.pid))
            if seconds and b"=== untrained" in Path(output.name).read_bytes():
                end, seconds = time.monotonic() + seconds, None
            time.sleep(0.02)
        process.kill()
        process.wait()
    return peak / 1e6


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE") + sum(resident(int(n)) for part in lists for n in part)


def measure_loading(data: config_lib.DataConfig) -> None:
    """Print the characters a second that one core makes batches of."""
    train = texts.load_texts(data).texts["train"]
    ids = train.encode(train.vocabulary(data))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for kind in ("windows", "streams"):
        fields = config_lib.complete_config({"batches": {"kind": kind}}).batches
        iterator, _ = batches.make_batches(ids, fields, seed=0)
        rates = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(500):
                next(iterator)
            rates.append(500 * 64 * 100 / (time.perf_counter() - began))
        rate = statistics.median(rates) / 1e6
        print(f"loading {kind}: {rate:.1f} million characters/s on a core", flush=True)
    os.sched_setaffinity(0, cores)


def measure_steps(data: config_lib.DataConfig, rounds: int) -> None:
    """Print the time of a step with its data, relative to one on a constant batch."""
    for name, (batch, window), (embedding, hidden), steps, per_call in (
        ("shakespeare.py", (64, 100), (256, 1024), 1, 1),
        ("quick.py", (64, 48), (128, 448), 10, 1),
        ("24 hidden units", (8, 32), (8, 24), 200, 1),
        ("24 hidden units, steps_per_call=10", (8, 32), (8, 24), 20, 10),
    ):
        config = config_lib.default()
        config.batches.batch_size, config.batches.window_length = batch, window
        config.model.embedding_size, config.model.hidden_size = embedding, hidden
        complete = config_lib.complete_config(config)
        ratios = compute_ratios(complete, data, steps, per_call, rounds)
        printed = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
        print(f"time of a step with its data / on a constant batch, {name}: {printed}", flush=True)


def compute_ratios(
    config: config_lib.Config,
    data: config_lib.DataConfig,
    calls: int,
    per_call: int,
    rounds: int,
) -> dict[str, float]:
    """Return the median times of steps with their data, relative to a constant batch."""
    parallel.use_cores(config)
    memory.keep_freed_memory()
    mesh = parallel.make_mesh(config)
    text = texts.load_texts(data).texts["train"]
    vocabulary = text.vocabulary(data)
    ids, size = text.encode(vocabulary), len(vocabulary)
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
    seconds = [[run(read) for read in readers.values()] for _ in range(rounds)]
    # Compute ratios per round, because the machine's speed changes between rounds.
    ratios = np.median([np.array(times) / times[0] for times in seconds], axis=0)
    return dict(zip(readers, ratios.tolist(), strict=True))


if __name__ == "__main__":
    main()
