"""Encode the chunks of a large text, in one of several processes.

`python -m lstm_jax.data.worker DIRECTORY NUMBER TOTAL` encodes every TOTAL-th chunk of the plan
in a directory. It imports little more than NumPy, so that many processes need little memory.
"""

import hmac
import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from lstm_jax.data import files, sources
from lstm_jax.data.encoding import Part, encode_chunk
from lstm_jax.errors import UserError

PLAN = "plan.json"
# The environment variable with the key of `save_part`, in hexadecimal.
KEY = "LSTM_JAX_PARTS_KEY"
_SEAL_BYTES = 32


def save_part(path: Path, part: Part, key: bytes) -> None:
    """Write an encoded chunk atomically, sealed with a key."""
    tokens = np.frombuffer(json.dumps(part.tokens).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, ids=part.ids, units=tokens, counts=part.counts, characters=part.characters)
    files.write_file(path, _seal(path, content.getvalue(), key) + content.getbuffer())


def load_part(path: Path, chunk: list[sources.Segment], key: bytes) -> Part | None:
    """Return the encoded chunk that `save_part` wrote with this key, or None."""
    try:
        # Ids, tokens and counts take less than 32 bytes for each byte of text.
        content = files.read_bytes(path, 2**16 + 32 * sources.count_bytes(chunk))
    except OSError:
        return None
    seal, content = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
    if not hmac.compare_digest(seal, _seal(path, content, key)):
        return None
    with np.load(io.BytesIO(content)) as arrays:
        tokens = json.loads(arrays["units"].tobytes())
        return Part(arrays["ids"], tokens, arrays["counts"], int(arrays["characters"]))


def _seal(path: Path, content: bytes, key: bytes) -> bytes:
    return hmac.digest(key, path.name.encode() + content, "sha256")


def get_part_path(directory: Path, number: int) -> Path:
    """Return the path of an encoded chunk."""
    return directory / f"{number:06}.npz"


def main() -> None:
    """Encode the chunks of this process; print the bytes of each, or an error as a JSON object."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent process handles it.
    directory, number, total = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    plan = json.loads((directory / PLAN).read_text(encoding="utf-8", errors="surrogateescape"))
    key = bytes.fromhex(os.environ[KEY])
    try:
        for i in range(number, len(plan["chunks"]), total):
            chunk = [sources.Segment(*segment) for segment in plan["chunks"][i]]
            path = get_part_path(directory, i)
            if load_part(path, chunk, key) is None:
                text = sources.read_segments(chunk, plan["units"] == "bytes")
                save_part(path, encode_chunk(text, plan["units"], plan["stop"]), key)
            _print(sources.count_bytes(chunk))
    except UserError as error:
        _print({"mistake": str(error)})
    except BrokenPipeError:  # The parent process has ended.
        os._exit(1)
    except OSError as error:
        _print({"unavailable": error.strerror})


def _print(content: object) -> None:
    # In one call, as all processes write to the same pipe.
    os.write(sys.stdout.fileno(), f"{json.dumps(content)}\n".encode())


if __name__ == "__main__":
    main()
