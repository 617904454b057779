"""Encode the chunks of a large text, in one of several processes.

`python -m lstm_jax.data.worker DIRECTORY NUMBER TOTAL` encodes every TOTAL-th chunk of the plan
in a directory. It imports little more than NumPy, so that many processes need little memory.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from lstm_jax.data import sources
from lstm_jax.data.encoding import Part, encode_chunk
from lstm_jax.errors import UserError

PLAN = "plan.json"


def save_part(directory: Path, number: int, part: Part) -> None:
    """Write an encoded chunk."""
    tokens = np.frombuffer(json.dumps(part.tokens).encode(), np.uint8)
    path = directory / f"{number:06}.npz"
    np.savez(path, ids=part.ids, tokens=tokens, counts=part.counts, characters=part.characters)


def load_part(directory: Path, number: int) -> Part:
    """Return the encoded chunk that `save_part` wrote."""
    with np.load(directory / f"{number:06}.npz") as arrays:
        tokens = json.loads(arrays["tokens"].tobytes())
        return Part(arrays["ids"], tuple(tokens), arrays["counts"], int(arrays["characters"]))


def main() -> None:
    """Encode the chunks of this process; print the bytes of each, or an error as a JSON object."""
    directory, number, total = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    plan = json.loads((directory / PLAN).read_text())
    try:
        for i in range(number, len(plan["chunks"]), total):
            chunk = [sources.Segment(*segment) for segment in plan["chunks"][i]]
            text = sources.read_segments(chunk, plan["units"] == "bytes")
            save_part(directory, i, encode_chunk(text, plan["units"], plan["stop"]))
            _print(sources.count_bytes(chunk))
    except UserError as error:
        _print({"mistake": str(error)})
    except OSError as error:
        _print({"unavailable": error.strerror or str(error)})


def _print(content: object) -> None:
    try:  # In one call, as all processes write to the same pipe.
        os.write(sys.stdout.fileno(), f"{json.dumps(content)}\n".encode())
    except BrokenPipeError:  # The parent process has ended, or another process has failed.
        os._exit(1)


if __name__ == "__main__":
    main()
