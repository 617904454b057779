"""Measure the time to encode a large text.

    python benchmarks/data.py --corpus corpus --megabytes 1000

If the directory has no text yet, one of this size is made from Tiny Shakespeare. Each repetition
has its paragraphs in another order. One character in a hundred is replaced by another of the text,
and one in a thousand by one of two, three or four bytes.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from frame import parse_flags, run_python, time_call
from lstm_jax.config import DataConfig
from lstm_jax.data import texts

MANY_BYTES = np.array([ord(c) for c in "éñßøλжשあ日語🎭"], np.uint32)
FILE_BYTES = 100_000_000
ENCODE = """
import sys
from lstm_jax.config import DataConfig
from lstm_jax.data import texts
data = DataConfig(path=sys.argv[1], units=sys.argv[2], fractions=(0.9998, 0.0001, 0.0001))
splits = texts.load_texts(data)
texts.encode_splits(splits, splits["train"].make_vocabulary(data))
"""


def main() -> None:
    """Encode the text in a process, and open it again."""
    options = parse_flags(__doc__, corpus=Path, megabytes=1000, units="characters")
    if not list(options.corpus.glob("*.txt")):
        make_corpus(options.corpus, options.megabytes * 10**6)
    megabytes = sum(file.stat().st_size for file in options.corpus.glob("*.txt")) / 1e6
    with tempfile.TemporaryDirectory(dir=options.corpus) as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        for action in ("encoding", "opening again"):
            path = f"{options.corpus}/*.txt"
            seconds = time_call(run_python, "-c", ENCODE, path, options.units)
            print(f"{action}: {megabytes:,.0f} MB in {seconds:.1f} s with all imports")


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


if __name__ == "__main__":
    main()
