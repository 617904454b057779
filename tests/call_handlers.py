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
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax.ops import in_c, native
from lstm_jax.ops.gates import GATINGS, PEEPHOLE_LSTM, GatedParams, Gating, Layer, LSTMCarry, Marks

# The numbers of XLA's types.
_TYPES = {"float32": 11, "bfloat16": 16, "uint8": 6, "int32": 4, "uint32": 8, "float64": 12}


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


def record(function: Any, parts: int, *arguments: Any) -> list[Call]:
    """Return the calls of the library that a function of `in_c` makes."""
    calls: list[Call] = []

    def make(x: Any) -> np.ndarray:
        values = {"uint8": [0, 1, 2], "int32": [0, -1, 33, 130, 2**31 - 1]}  # Marks and targets.
        return np.resize(np.array(values.get(x.dtype.name, 0), x.dtype), x.shape)

    def call(name: str, arguments: Any, *results: Any, aliases: Any = None, **numbers: int) -> Any:
        arrays = [*map(make, arguments)], [*map(make, results)]
        calls.append(Call(name, {**numbers, "parts": parts}, *arrays))
        return [jnp.zeros(x.shape, x.dtype) for x in results]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_c, "_call", call)
        patch.setattr(native, "count_threads", lambda: parts)
        jax.eval_shape(function, *arguments)
    return calls


def list_calls(gating: Gating, dtype: str, parts: int, *sizes: int) -> list[Call]:
    """Return the calls of a layer, with marks and without."""
    time, batch, features, hidden = sizes
    columns = [len(x) * hidden for x in (gating.of_inputs, gating.of_hidden)]
    shapes = (features, columns[0]), (hidden, columns[1]), (gating.num_sums * hidden,)
    peepholes = jnp.zeros((3 * (gating is PEEPHOLE_LSTM), hidden))
    input_kernel, recurrent_kernel, bias = map(jnp.zeros, shapes)
    params = GatedParams(input_kernel, recurrent_kernel, bias, peepholes)
    cell = hidden if gating.carry is LSTMCarry else 0
    carry = LSTMCarry(jnp.zeros((batch, cell)), jnp.zeros((batch, hidden)))
    inputs, mask = jnp.zeros((time, batch, features)), jnp.zeros((time, batch), bool)

    def run(params: Any, inputs: Any, carry: Any) -> None:
        for marks in (Marks(None, None), Marks(mask, mask)):
            layer = Layer(gating, dtype, 1, params, inputs, carry, marks)
            (last, outputs), saved = in_c.forward(layer)
            in_c.backward(layer, saved, last, outputs)
        kernel = in_c.pack_gates(gating, jnp.zeros((features, len(bias)), dtype))
        for rows in (1, batch):
            state = gating.carry.zeros(batch, hidden)
            weights = peepholes if len(peepholes) else None
            added = jnp.zeros((rows, len(bias)))
            in_c.run_step(gating, kernel, inputs[0], added, state, weights)

    return record(run, parts, params, inputs, carry)


def list_matmuls(dtype: str, parts: int, rows: int, depth: int, width: int) -> list[Call]:
    """Return calls of matmuls, and of the loss of `rows` tokens of a vocabulary of `width`."""

    def run(a: jax.Array, b: jax.Array) -> None:
        for transpose_a, transpose_b in itertools.product((False, True), repeat=2):
            factors = a.T if transpose_a else a, b.T if transpose_b else b
            in_c.matmul(*factors, transpose_a, transpose_b)
            if not transpose_a:
                arrays = *factors, jnp.zeros(width), jnp.zeros(rows, int), transpose_b
                for differentiable in (False, True):
                    in_c.compute_cross_entropy(*arrays, differentiable)

    return record(run, parts, jnp.zeros((rows, depth), dtype), jnp.zeros((depth, width), dtype))


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
            if (name == "kind" and value in range(4)) or value == call.attributes[name]:
                continue
            if name in ("parts", "features", "kind"):
                yield (name, value), call._replace(attributes={**call.attributes, name: value})


def check_calls(program: Program) -> None:
    """Call all functions with right arrays, and then with wrong ones; assert which are errors."""
    lanes, right, wrong = program.lanes, list[Call](), list[tuple[Any, Call]]()
    sizes = (1, 5), (1, 3, 7), (1, 70), (lanes, 5 * lanes)
    dtypes = ("float32", "bfloat16")[: len(program.numbers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_library", lambda: native.Library("", lanes, False))
        for gating, dtype in itertools.product(GATINGS.values(), dtypes):
            for layer in itertools.product(*sizes):
                for parts in (1, 3):
                    right += list_calls(gating, dtype, parts, *layer)
            for call in list_calls(gating, dtype, 2, 5, 3, 5, 3 * lanes):
                wrong += list_wrong_calls(call)
            odd = list_calls(gating, dtype, 2, 5, 3, 5, 3 * lanes // 2)
            loops = [x for x in odd if x.name in ("forward", "backward")]
            wrong += [("a hidden size with half a vector", x) for x in loops]
        for dtype in dtypes:
            for matrices in itertools.product((1, 3), (1, 7, 200), (1, 5, 70), (1, 33, 130)):
                right += list_matmuls(dtype, *matrices)
            right += list_matmuls(dtype, 2, 7, 9000, 33)  # A depth of several parts.
            for shape in ((71, 5, 33), (7, 6, 33)):
                for call in list_matmuls(dtype, 2, *shape):
                    wrong += list_wrong_calls(call)
    for message, _ in program.run(right):
        assert not message, message
    errors = program.run([call for _, call in wrong])
    for (what, call), (message, _) in zip(wrong, errors, strict=True):
        assert message == f"lstm_{call.name}: wrong arrays", what
