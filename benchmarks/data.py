"""Measure the cost of large texts: preparation, memory, and batches.

    python benchmarks/data.py --corpus corpus --megabytes 1000

If the directory has no text yet, one of this size is made from Tiny Shakespeare. Each repetition
has its paragraphs in another order. One character in a hundred is replaced by another of the text,
and one in a thousand by one of two, three or four bytes. Memory is the sampled sum of the resident
pages of all processes.
"""

import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from frame import ROOT, make_step, parse_flags, time_call
from lstm_jax import batches
from lstm_jax import config as config_lib
from lstm_jax.data import texts
from lstm_jax.devices import feeding
from lstm_jax.vocabulary import Ids

MANY_BYTES = np.array([ord(c) for c in "éñßøλжשあ日語🎭"], np.uint32)
FILE_BYTES = 100_000_000
# Short validation and test splits, so that the evaluation before the first step is short.
FRACTIONS = (0.9998, 0.0001, 0.0001)
PREPARE = f"""
import sys
from lstm_jax import config
from lstm_jax.data import prepared
data = config.DataConfig(path=sys.argv[1], prepared=sys.argv[2], fractions={FRACTIONS})
prepared.prepare_corpus(data)
"""


def main() -> None:
    """Measure and print preparation, memory, loading, and steps."""
    options = parse_flags(__doc__, corpus=Path, megabytes=1000, train_seconds=30.0, rounds=15)
    if not list(options.corpus.glob("*.txt")):
        make_corpus(options.corpus, options.megabytes * 10**6)
    megabytes = sum(file.stat().st_size for file in options.corpus.glob("*.txt")) / 1e6
    with tempfile.TemporaryDirectory(dir=options.corpus) as scratch:
        path, prepared = f"{options.corpus}/*.txt", f"{scratch}/prepared"
        data = config_lib.DataConfig(path=path, prepared=prepared, fractions=FRACTIONS)
        began = time.monotonic()
        peak = measure_peak("-c", PREPARE, data.path, data.prepared)
        seconds = time.monotonic() - began
        print(
            f"preparation: {megabytes:,.0f} MB in {seconds:.1f} s with all imports, "
            f"{megabytes / seconds:.0f} MB/s on {os.cpu_count()} cores, peak {peak:,.0f} MB"
        )
        quick = ("-m", "lstm_jax.main", "--config=experiments/quick.py")
        for name, fields in {
            "Tiny Shakespeare": [],
            "the corpus": [
                f"--config.data.path={data.path}",
                f"--config.data.prepared={data.prepared}",
                f"--config.data.fractions={','.join(map(str, FRACTIONS))}",
            ],
        }.items():
            workdir = f"--workdir={scratch}/{name}"
            peak = measure_peak(*quick, workdir, *fields, seconds=options.train_seconds)
            print(f"training quick.py on {name}: peak {peak:,.0f} MB", flush=True)
        text = texts.load_texts(data).texts["train"]
        vocabulary = text.vocabulary(data)
        ids = text.encode(vocabulary)
        measure_loading(ids)
        for name, sizes, calls, per_call in (
            ("shakespeare.py", (64, 100, 256, 1024), 1, 1),
            ("quick.py", (64, 48, 128, 448), 10, 1),
            ("24 hidden units", (8, 32, 8, 24), 200, 1),
            ("24 hidden units, steps_per_call=10", (8, 32, 8, 24), 20, 10),
        ):
            ratios = compute_ratios(ids, len(vocabulary), sizes, calls, per_call, options.rounds)
            shown = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
            print(
                f"time of a step with its data / on a constant batch, {name}: {shown}", flush=True
            )


def make_corpus(directory: Path, size: int) -> None:
    """Write files of this many bytes in all."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paragraphs = "".join(texts.read_splits(config_lib.DataConfig()).values()).split("\n\n")
    written = number = 0
    while written < size:
        with (directory / f"part{number:03}.txt").open("wb") as file:
            while written < size and file.tell() < FILE_BYTES:
                written += file.write(_perturb(paragraphs, rng).encode())
        number += 1


def _perturb(paragraphs: list[str], rng: np.random.Generator) -> str:
    order = rng.permutation(len(paragraphs))
    text = "\n\n".join([paragraphs[i] for i in order]) + "\n\n"
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).copy()
    for share, source in ((0.01, codes), (0.001, MANY_BYTES)):
        places = rng.integers(len(codes), size=int(share * len(codes)))
        codes[places] = rng.choice(source, len(places))
    return codes.tobytes().decode("utf-32-le")


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
        if process.poll():
            raise subprocess.CalledProcessError(process.returncode, words)
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


def measure_loading(ids: Ids) -> None:
    """Print the characters a second that one core makes batches of."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for kind in ("windows", "streams"):
        fields = config_lib.complete_config({"batches": {"kind": kind}}).batches
        iterator, _ = batches.make_batches(ids, fields, seed=0)
        seconds = [time_call(deque, itertools.islice(iterator, 500), 0) for _ in range(5)]
        rate = 500 * fields.batch_size * fields.window_length / statistics.median(seconds) / 1e6
        print(f"loading {kind}: {rate:.1f} million characters/s on a core", flush=True)
    os.sched_setaffinity(0, cores)


def compute_ratios(
    ids: Ids, vocabulary_size: int, sizes: tuple[int, ...], calls: int, per_call: int, rounds: int
) -> dict[str, float]:
    """Return the median times of steps with their data, relative to a constant batch.

    The sizes are those of batches, windows, the embedding and the hidden state.
    """
    batch_size, window_length, embedding_size, hidden_size = sizes
    config = config_lib.complete_config(
        {
            "batches": {"batch_size": batch_size, "window_length": window_length},
            "model": {"embedding_size": embedding_size, "hidden_size": hidden_size},
        }
    )
    state, step, mesh = make_step(config, vocabulary_size)
    short = np.asarray(ids[:1_000_000])
    on_device, _ = batches.make_batches(short, config.batches, 0, only_offsets=True)
    from_files, _ = batches.make_batches(ids, config.batches, 0)
    text = feeding.place_text(short, vocabulary_size, mesh)
    feeds = {
        "on the device": feeding.Feed(on_device, mesh, text),
        "from files": feeding.Feed(from_files, mesh, None),
    }
    constant = feeds["from files"].next(per_call)

    def run(read: Callable[[], Any]) -> None:
        nonlocal state
        for _ in range(calls):
            state = step(state, read())
        jax.block_until_ready(state)

    readers: dict[str, Callable[[], Any]] = {"constant": lambda: constant}
    readers |= {name: functools.partial(feed.next, per_call) for name, feed in feeds.items()}
    seconds = np.array(
        [[time_call(run, read) for read in readers.values()] for _ in range(rounds + 1)]
    )
    # Without the first round, which compiles. Compute ratios per round, because the machine's speed
    # changes between rounds.
    ratios = np.median(seconds[1:] / seconds[1:, :1], axis=0)
    return dict(zip(readers, ratios.tolist(), strict=True))


if __name__ == "__main__":
    main()
