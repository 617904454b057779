"""Compress a file without loss to the size that a model's loss promises, and decompress it.

    python examples/compress.py pack tiny-shakespeare my.txt my.lstm
    python examples/compress.py unpack tiny-shakespeare my.lstm copy.txt

The model predicts each token from those before it, and an entropy coder writes it in about
-log2(probability) bits. It must know every character; models of bytes know all. Blocks of a long
text are read side by side, each from a zero carry. A file can be unpacked only where the model
computes the same probabilities, bit for bit: on the same kind of processor, with the same versions
of JAX and of this package. Checksums in the header detect another model or machine.
"""

import hashlib
import os
import sys
import zlib
from pathlib import Path
from typing import Any

# With several threads, the order of a sum could depend on their number. JAX reads this once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import numpy as np
from constriction import stream

import lstm_jax


def code(run: lstm_jax.Run, coders: list[Any], blocks: list[np.ndarray]) -> None:
    """Encode the ids of each block, or decode them into it, by the same programs and shapes."""
    state = run.read(np.zeros((len(blocks), 0), np.int32))
    for t in range(max(map(len, blocks))):
        column = np.zeros((len(blocks), 1), np.int32)
        for i, probabilities in enumerate(get_probabilities(state)):
            if t < len(blocks[i]):
                # The coder rounds the probabilities to multiples of 2**-24, none of them zero.
                model = stream.model.Categorical(probabilities, lazy=True)
                if isinstance(coders[i], stream.queue.RangeEncoder):
                    coders[i].encode(int(blocks[i][t]), model)
                else:
                    blocks[i][t] = coders[i].decode(model)
                column[i] = blocks[i][t]
        state = run.read(column, state)


def get_probabilities(state: Any) -> np.ndarray:
    """Return the probabilities of the next tokens, float64 [blocks, vocabulary], not normalized."""
    logits = np.asarray(state.logits, np.float64)
    return np.exp(logits - logits.max(axis=1, keepdims=True))


def make_header(run: lstm_jax.Run, blocks: int, packed: bytes) -> bytes:
    """Return checksums of the model, and of `packed` with what it computes here for the blocks."""
    model = hashlib.sha256(repr(run.vocabulary.to_fields()).encode())
    for array in jax.tree.leaves(run.params):
        model.update(np.asarray(array).tobytes())
    state, crc = run.read(np.zeros((blocks, 0), np.int32)), zlib.crc32(packed)
    for token in range(min(len(run.vocabulary), 64)):
        state = run.read(np.full((blocks, 1), token, np.int32), state)
        crc = zlib.crc32(get_probabilities(state).tobytes(), crc)
    return b"LSTM" + model.digest()[:8] + crc.to_bytes(4, "little")


def pack(run: lstm_jax.Run, text: bytes, block_length: int = 2**17) -> bytes:
    """Return a header, the lengths, checksums and sizes of the blocks, and their 32-bit words."""
    characters = text.decode("utf-8", "surrogateescape")
    ids = run.vocabulary.encode(characters).astype("<i4")
    if not text or run.vocabulary.decode(ids) != characters:
        raise lstm_jax.UserError("the file is empty, or has characters that the model lacks")
    blocks = np.array_split(ids, -(-len(ids) // block_length))
    coders = [stream.queue.RangeEncoder() for _ in blocks]
    code(run, coders, blocks)
    words = [coder.get_compressed() for coder in coders]
    numbers = [*map(len, blocks), *(zlib.crc32(b.data) for b in blocks), *map(len, words)]
    packed = np.concatenate([numbers, *words]).astype("<u4").tobytes()
    return make_header(run, len(blocks), packed) + len(blocks).to_bytes(4, "little") + packed


def unpack(run: lstm_jax.Run, data: bytes) -> bytes:
    """Return the text of `pack`; raise `UserError` if it was packed elsewhere, or is damaged."""
    number, packed = int.from_bytes(data[16:20], "little"), data[20:]
    if not 0 < 12 * number <= len(packed) or data[:16] != make_header(run, number, packed):
        raise lstm_jax.UserError("it is damaged, or of another model or kind of machine")
    rest = np.frombuffer(packed, "<u4").astype(np.uint32)
    lengths, checksums, sizes = rest[: 3 * number].reshape(3, number).tolist()
    words = np.split(rest[3 * number :], np.cumsum(sizes)[:-1])
    blocks = [np.zeros(length, "<i4") for length in lengths]
    code(run, [stream.queue.RangeDecoder(part) for part in words], blocks)
    if damaged := [i for i, ids in enumerate(blocks) if zlib.crc32(ids.data) != checksums[i]]:
        raise lstm_jax.UserError(f"these blocks can't be decoded here: {damaged}")
    return run.vocabulary.decode(np.concatenate(blocks)).encode("utf-8", "surrogateescape")


if __name__ == "__main__":
    action, directory, source, target = sys.argv[1:] if len(sys.argv) == 5 else sys.exit(__doc__)
    convert = pack if action == "pack" else unpack if action == "unpack" else sys.exit(__doc__)
    Path(target).write_bytes(convert(lstm_jax.load(directory), Path(source).read_bytes()))
    print(f"{Path(source).stat().st_size:,} bytes in, {Path(target).stat().st_size:,} bytes out")
