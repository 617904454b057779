"""Call every function of the library in C with right and wrong arrays.

`python tests/call_handlers.py LIBRARY`, a library that call_handlers.c was compiled to, fails if a
call with right arrays returns an error, or one with wrong arrays does not. It imports no JAX, so
that it runs under AddressSanitizer.
"""

import ctypes
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LSTM, PEEPHOLE_LSTM, GRU, RNN = range(4)
# The numbers of XLA's types; bfloat16 is in arrays of uint16.
_TYPES = {"float32": 11, "uint16": 16, "uint8": 6, "int32": 4, "uint32": 8, "float64": 12}


class Call(NamedTuple):
    """A call of a function of the library."""

    name: str
    attributes: Mapping[str, int]
    arguments: Sequence[np.ndarray]
    results: Sequence[np.ndarray]


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


def run(library: ctypes.CDLL, call: Call) -> str | None:
    """Return the message of the error that a call returns, if any."""
    arrays = [*call.arguments, *call.results]
    dims = [(ctypes.c_int64 * max(x.ndim, 1))(*x.shape) for x in arrays]
    buffers = [
        _Buffer(0, None, _TYPES[x.dtype.name], x.ctypes.data, x.ndim, d)
        for x, d in zip(arrays, dims, strict=True)
    ]
    names = [name.encode() for name in call.attributes]
    library.call_handler.restype = ctypes.c_char_p
    message: bytes | None = library.call_handler(
        library[f"lstm_{call.name}"],
        ctypes.c_int64(len(names)),
        (ctypes.c_char_p * len(names))(*names),
        (ctypes.c_int64 * len(names))(*call.attributes.values()),
        ctypes.c_int64(len(call.arguments)),
        ctypes.c_int64(len(call.results)),
        (_Buffer * len(buffers))(*buffers),
    )
    return None if message is None else message.decode()


def list_calls(
    kind: int, numbers: int, time: int, batch: int, features: int, hidden: int, parts: int = 2
) -> Iterator[Call]:
    """Yield calls with right arrays; `numbers` of a word are 1 or 2."""
    dtype = {1: "float32", 2: "uint16"}[numbers]
    num_sums = 1 if kind == RNN else 4
    width, words = num_sums * hidden, -(-(hidden + features + 1) // numbers)
    tiles = -(-hidden * num_sums // 64)
    cell, gates = hidden if kind in (LSTM, PEEPHOLE_LSTM) else 0, 0 if kind == RNN else width
    attributes = {"kind": kind, "parts": parts}

    def make(*shape: int, dtype: str = "float32") -> np.ndarray:
        return np.zeros(shape, dtype)

    def make_state() -> list[np.ndarray]:
        return [make(batch, cell), make(batch, hidden)]

    packed = make(tiles, words, 4, 16, numbers, dtype=dtype)
    peepholes = make(3 if kind == PEEPHOLE_LSTM else 0, hidden)
    steps = make(time, batch, cell), make(time, batch, hidden)
    for added in {1, batch}:
        rows = make(batch, words * numbers, dtype=dtype)
        arguments = rows, packed, make(added, width), *make_state(), peepholes
        yield Call("step", attributes, arguments, make_state())
    for num_marks in (0, time):
        marks = np.arange(num_marks * batch, dtype="uint8").reshape(num_marks, batch) % 3
        yield Call(
            "forward",
            {**attributes, "features": features},
            (make(time, batch, features), packed, *make_state(), peepholes, marks),
            (make(time, batch, gates), *steps, make(time, batch, words * numbers, dtype=dtype)),
        )
        transposed = make(-(-hidden // 64), width // numbers, 64, numbers, dtype=dtype)
        last, of_outputs = make_state(), make(time, batch, hidden)
        of_gates = make(time, batch, gates), transposed, *make_state()
        yield Call(
            "backward",
            attributes,
            (*of_gates, *steps, of_outputs, *last, peepholes, marks),
            (make(time, batch, width, dtype=dtype), *last),
        )


def list_matmuls(rows: int, depth: int, width: int, parts: int = 2) -> Iterator[Call]:
    """Yield calls of matmuls, and of the loss of `rows` tokens of a vocabulary of `width`."""
    words, tiles = -(-depth // 2), -(-width // 64)
    blocks = np.zeros((parts, 96 * 256), "uint32")
    for transpose_a, transpose_b in itertools.product((False, True), repeat=2):
        a = np.zeros((depth, rows) if transpose_a else (rows, depth), "uint16")
        b = np.zeros((width, depth) if transpose_b else (depth, width), "uint16")
        results: list[Any] = [np.zeros((rows, width), "float32")]
        if rows > width:
            results += np.zeros(64 * tiles * words, "uint32"), blocks
        else:
            results += np.zeros(rows * words, "uint32"), np.zeros((parts, words * 64), "uint32")
        attributes = {"parts": parts, "transpose_a": transpose_a, "transpose_b": transpose_b}
        yield Call("matmul", attributes, (a, b), results)
        targets = np.resize(np.array([0, -1, width, 2**31 - 1], "int32"), rows)
        for shape in [(rows, width), (0, 0)] if not transpose_a else ():
            yield Call(
                "cross_entropy",
                {"parts": parts, "is_transposed": transpose_b},
                (a, b, np.zeros(width, "float32"), targets),
                (
                    *(np.zeros(rows, "float32") for _ in "ab"),
                    np.zeros(shape, "uint16"),
                    np.zeros(64 * tiles * words, "uint32"),
                    blocks,
                    np.zeros((parts, 96, 64 * tiles), "uint32"),
                ),
            )


def list_wrong_calls(call: Call) -> Iterator[tuple[Any, Call]]:
    """Yield calls in which one array is wrong, with what was changed."""
    arrays = [*call.arguments, *call.results]
    for i, array in enumerate(arrays):
        shapes = [array.shape[:-1], (*array.shape, 1)]
        for axis, change in itertools.product(range(array.ndim), (-1, 1)):
            shape = list(array.shape)
            shape[axis] += change
            shapes += [tuple(shape)] * (shape[axis] >= 0)
        wrong = [np.zeros(shape, array.dtype) for shape in shapes]
        for other in (*wrong, array.astype("float64")):
            changed = [*arrays[:i], other, *arrays[i + 1 :]]
            n = len(call.arguments)
            what = (call.name, call.attributes, i, array.shape, other.shape, other.dtype.name)
            yield what, call._replace(arguments=changed[:n], results=changed[n:])
    yield "fewer arguments", call._replace(arguments=call.arguments[:-1])
    yield "fewer results", call._replace(results=call.results[:-1])
    for name in call.attributes:
        for value in (-1, 0, 9) if name != "parts" else (-1, 0):
            if name in ("parts", "features") or (name == "kind" and value not in range(4)):
                yield (name, value), call._replace(attributes={**call.attributes, name: value})


def check_wrong_calls(library: ctypes.CDLL, call: Call) -> None:
    """Assert that each wrong call is an error."""
    for what, wrong in list_wrong_calls(call):
        message = run(library, wrong)
        assert message is not None and message.startswith(f"lstm_{call.name}: "), what


def main(path: str) -> None:
    """Call all functions of the library with right arrays, and then with wrong ones."""
    library = ctypes.CDLL(path)
    layers = [*itertools.product((1, 5), (1, 3, 7), (1, 5, 70), (16, 48, 80), (1, 3))]
    for kind, numbers in itertools.product(range(4), (1, 2)):
        for sizes in layers:
            for call in list_calls(kind, numbers, *sizes):
                message = run(library, call)
                assert message is None, message
        for call in list_calls(kind, numbers, 5, 3, 5, 48):
            check_wrong_calls(library, call)
        for call in list_calls(kind, numbers, 5, 3, 5, 24):
            assert "multiple of 16" in (run(library, call) or "")
    for matrices in itertools.product((1, 7, 200), (1, 5, 70), (1, 33, 130), (1, 3)):
        for call in list_matmuls(*matrices):
            message = run(library, call)
            assert message is None, message
    for call in (*list_matmuls(70, 5, 33), *list_matmuls(7, 6, 33)):
        check_wrong_calls(library, call)


if __name__ == "__main__":
    main(sys.argv[1])
