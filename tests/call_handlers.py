"""Call the functions of the library in C by a program of its own, as XLA calls them.

The program, call_handlers.c, can be compiled with AddressSanitizer, or for another processor.
"""

import io
import itertools
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

LSTM, PEEPHOLE_LSTM, GRU, RNN = range(4)
# The numbers of XLA's types.
_TYPES = {"float32": 11, "bfloat16": 16, "uint8": 6, "int32": 4, "uint32": 8, "float64": 12}


_DTYPES: dict[int, Any] = {1: np.dtype("float32"), 2: np.dtype(ml_dtypes.bfloat16)}


class Call(NamedTuple):
    """A call of a function of the library."""

    name: str
    attributes: Mapping[str, int]
    arguments: Sequence[np.ndarray]
    results: Sequence[np.ndarray]


class Program(NamedTuple):
    """A program that call_handlers.c was compiled to, and the processor that it is for."""

    command: Sequence[str]
    lanes: int
    numbers: Sequence[int]  # Of the words that it multiplies.

    def run(self, calls: Sequence[Call]) -> list[tuple[str, list[np.ndarray]]]:
        """Return the error of each call, "" if there is none, and its results."""
        return _run(self.command, calls)[1]


def compile_program(path: Path, command: Sequence[str], *runner: str) -> Program:
    """Compile the program to `path` with a compiler and its flags; `runner` runs it."""
    folder = Path(__file__).parent
    include = ["-I", str(folder.parent / "lstm_jax" / "ops"), "-I", jax.ffi.include_dir()]
    source = str(folder / "call_handlers.c")
    subprocess.run([*command, *include, source, "-o", str(path)], check=True)
    run = [*runner, str(path)]
    (lanes, has_bfloat16), _ = _run(run, [])
    return Program(run, lanes, (1, 2) if has_bfloat16 else (1,))


def _run(
    command: Sequence[str], calls: Sequence[Call]
) -> tuple[tuple[int, int], list[tuple[str, list[np.ndarray]]]]:
    def pack(*numbers: int) -> bytes:
        return struct.pack(f"{len(numbers)}q", *numbers)

    sent = [pack(len(calls))]
    for call in calls:
        sent += [pack(len(call.name)), call.name.encode(), pack(len(call.attributes))]
        for name, value in call.attributes.items():
            sent += [pack(len(name)), name.encode(), pack(value)]
        sent.append(pack(len(call.arguments), len(call.results)))
        for array in (*call.arguments, *call.results):
            dtype = _TYPES[array.dtype.name]
            sent.append(pack(dtype, array.ndim, *array.shape, array.nbytes) + array.tobytes())
    output = subprocess.run(command, input=b"".join(sent), stdout=subprocess.PIPE, check=True)
    received = io.BytesIO(output.stdout)
    facts, found = struct.unpack("2q", received.read(16)), []
    for call in calls:
        (length,) = struct.unpack("q", received.read(8))
        message = received.read(length).decode()
        results = [
            np.frombuffer(received.read(x.nbytes), x.dtype).reshape(x.shape) for x in call.results
        ]
        found.append((message, results))
    return facts, found


def list_calls(
    lanes: int,
    kind: int,
    numbers: int,
    time: int,
    batch: int,
    features: int,
    hidden: int,
    parts: int = 2,
) -> Iterator[Call]:
    """Yield calls with right arrays; `numbers` of a word are 1 or 2."""
    dtype, tile = _DTYPES[numbers], 4 * lanes
    num_sums = 1 if kind == RNN else 4
    width, words = num_sums * hidden, -(-(hidden + features + 1) // numbers)
    tiles = -(-hidden * num_sums // tile)
    cell, gates = hidden if kind in (LSTM, PEEPHOLE_LSTM) else 0, 0 if kind == RNN else width
    attributes = {"kind": kind, "parts": parts}

    def make(*shape: int, dtype: Any = "float32") -> np.ndarray:
        return np.zeros(shape, dtype)

    def make_state() -> list[np.ndarray]:
        return [make(batch, cell), make(batch, hidden)]

    packed = make(tiles, words, 4, lanes, numbers, dtype=dtype)
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
        transposed = make(-(-hidden // tile), width // numbers, tile, numbers, dtype=dtype)
        last, of_outputs = make_state(), make(time, batch, hidden)
        of_gates = make(time, batch, gates), transposed, *make_state()
        yield Call(
            "backward",
            attributes,
            (*of_gates, *steps, of_outputs, *last, peepholes, marks),
            (make(time, batch, width, dtype=dtype), *last),
        )


def list_matmuls(
    lanes: int, numbers: int, rows: int, depth: int, width: int, parts: int = 2
) -> Iterator[Call]:
    """Yield calls of matmuls, and of the loss of `rows` tokens of a vocabulary of `width`."""
    dtype, words, columns = _DTYPES[numbers], -(-depth // numbers), -(-width // (4 * lanes))
    columns *= 4 * lanes
    blocks = np.zeros((parts, 96 * 256), "uint32")
    for transpose_a, transpose_b in itertools.product((False, True), repeat=2):
        a = np.zeros((depth, rows) if transpose_a else (rows, depth), dtype)
        b = np.zeros((width, depth) if transpose_b else (depth, width), dtype)
        results: list[Any] = [np.zeros((rows, width), "float32")]
        if rows > width:
            results += np.zeros(columns * words, "uint32"), blocks
        else:
            results += np.zeros(rows * words, "uint32"), blocks[:, : words * 4 * lanes]
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
                    np.zeros(shape, dtype),
                    np.zeros(columns * words, "uint32"),
                    blocks,
                    np.zeros((parts, 96, columns), "uint32"),
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


def check_calls(program: Program) -> None:
    """Call all functions with right arrays, and then with wrong ones; assert which are errors."""
    lanes, right, wrong = program.lanes, list[Call](), list[tuple[Any, Call]]()
    sizes = (1, 5), (1, 3, 7), (1, 5, 70), (lanes, 3 * lanes, 5 * lanes), (1, 3)
    for kind, numbers in itertools.product(range(4), program.numbers):
        for layer in itertools.product(*sizes):
            right += list_calls(lanes, kind, numbers, *layer)
        for call in list_calls(lanes, kind, numbers, 5, 3, 5, 3 * lanes):
            wrong += list_wrong_calls(call)
        odd = list_calls(lanes, kind, numbers, 5, 3, 5, 3 * lanes // 2)
        wrong += [("a hidden size with half a vector", call) for call in odd]
    for numbers in program.numbers:
        for matrices in itertools.product((1, 7, 200), (1, 5, 70), (1, 33, 130), (1, 3)):
            right += list_matmuls(lanes, numbers, *matrices)
        for shape in ((70, 5, 33), (7, 6, 33)):
            for call in list_matmuls(lanes, numbers, *shape):
                wrong += list_wrong_calls(call)
    for message, _ in program.run(right):
        assert not message, message
    errors = program.run([call for _, call in wrong])
    for (what, call), (message, _) in zip(wrong, errors, strict=True):
        assert message.startswith(f"lstm_{call.name}: "), what
