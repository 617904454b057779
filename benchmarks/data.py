"""Measure the cost of large texts: encoding, and memory and speed of training.

    python benchmarks/data.py --corpus corpus --megabytes 1000

If the directory has no text yet, one of this size is made from Tiny Shakespeare. Each repetition
has its paragraphs in another order. One character in a hundred is replaced by another of the text,
and one in a thousand by one of two, three or four bytes. Memory is the sampled sum of the resident
pages of all processes.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from frame import ROOT, measure_speed, parse_flags
from lstm_jax.config import DataConfig
from lstm_jax.data import texts

MANY_BYTES = np.array([ord(c) for c in "éñßøλжשあ日語🎭"], np.uint32)
FILE_BYTES = 100_000_000
# Short validation and test splits, so that the evaluation before the first step is short.
FRACTIONS = (0.9998, 0.0001, 0.0001)
ENCODE = f"""
import sys
from lstm_jax.config import DataConfig
from lstm_jax.data import texts
data = DataConfig(path=sys.argv[1], units=sys.argv[2], fractions={FRACTIONS})
splits = texts.load_texts(data)
splits.encode(splits.texts["train"].make_vocabulary(data))
"""


def main() -> None:
    """Measure and print encoding, and memory and speed of training."""
    options = parse_flags(
        __doc__, corpus=Path, megabytes=1000, units="characters", train_seconds=30.0
    )
    if not list(options.corpus.glob("*.txt")):
        make_corpus(options.corpus, options.megabytes * 10**6)
    megabytes = sum(file.stat().st_size for file in options.corpus.glob("*.txt")) / 1e6
    with tempfile.TemporaryDirectory(dir=options.corpus) as scratch:
        os.environ["XDG_CACHE_HOME"], path = scratch, f"{options.corpus}/*.txt"
        for action in ("encoding", "opening again"):
            began = time.monotonic()
            peak = measure_peak("-c", ENCODE, path, options.units)
            seconds = time.monotonic() - began
            print(
                f"{action}: {megabytes:,.0f} MB in {seconds:.1f} s with all imports, "
                f"{megabytes / seconds:.0f} MB/s, peak {peak:,.0f} MB"
            )
        quick = ("-m", "lstm_jax.main", "--config=experiments/quick.py")
        for name, fields in {
            "Tiny Shakespeare": [],
            "the corpus": [
                f"--config.data.path={path}",
                f"--config.data.units={options.units}",
                f"--config.data.fractions={','.join(map(str, FRACTIONS))}",
            ],
        }.items():
            directory = Path(scratch, name)
            flags = (f"--workdir={directory}", *fields)
            peak = measure_peak(*quick, *flags, seconds=options.train_seconds)
            speed = measure_speed(directory)
            print(f"training quick.py on {name}: peak {peak:,.0f} MB, {speed:,.0f} characters/s")


def make_corpus(directory: Path, size: int) -> None:
    """Write files of this many bytes in all."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paragraphs = "".join(texts.read_splits(DataConfig()).values()).split("\n\n")
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

    With `seconds`, end it that long after it has printed a sample of the untrained model.
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


if __name__ == "__main__":
    main()
