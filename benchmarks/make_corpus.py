"""Make a large text by repeating and perturbing a real one.

    python benchmarks/make_corpus.py --directory corpus --megabytes 1000

Each repetition has the paragraphs of Tiny Shakespeare in another order. One character in a hundred
is replaced by another of the text, and one in a thousand by one of two, three or four bytes.
"""

from pathlib import Path

import numpy as np

from frame import parse_flags
from lstm_jax import config
from lstm_jax.data import texts

_MANY_BYTES = np.array([ord(c) for c in "éñßøλжשあ日語🎭"], np.uint32)
_FILE_BYTES = 100_000_000


def main() -> None:
    """Write the files."""
    options = parse_flags(__doc__, directory=Path, megabytes=1000)
    size, directory = options.megabytes * 10**6, options.directory
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paragraphs = "".join(texts.read_splits(config.DataConfig()).values()).split("\n\n")
    written = number = 0
    while written < size:
        with (directory / f"part{number:03}.txt").open("wb") as file:
            while written < size and file.tell() < _FILE_BYTES:
                written += file.write(_perturbed(paragraphs, rng).encode())
        number += 1


def _perturbed(paragraphs: list[str], rng: np.random.Generator) -> str:
    order = rng.permutation(len(paragraphs))
    text = "\n\n".join([paragraphs[i] for i in order]) + "\n\n"
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).copy()
    for share, source in ((0.01, codes), (0.001, _MANY_BYTES)):
        places = rng.integers(len(codes), size=int(share * len(codes)))
        codes[places] = rng.choice(source, len(places))
    return codes.tobytes().decode("utf-32-le")


if __name__ == "__main__":
    main()
