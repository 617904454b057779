"""Run one LSTM layer with the library in C: over time, with a custom VJP, or for a single step."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax.cells.lstm import Kernels, LSTMCarry
from lstm_jax.matmul import matmul_rounded
from lstm_jax.ops import native
from lstm_jax.ops.accelerator import Steps, compute_step

LANES, _TILE = 16, 64  # As in lstm.c.
NUMBERS_IN_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}  # Of 32 bits.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def run_recurrence(
    kernels: Kernels, steps: Steps, carry: LSTMCarry, dtype: str
) -> tuple[jax.Array, LSTMCarry]:
    """Run one layer: [time, batch, features] → [time, batch, hidden], and the carry.

    All numbers are float32, the factors of matmuls are rounded to `dtype`, and the hidden size is a
    multiple of `LANES`. The gradient can't be differentiated again.
    """
    return _forward(kernels, steps, carry, dtype)[0]


def pack_gates(kernel: jax.Array) -> jax.Array:
    """Arrange a kernel [depth, 4 * hidden] in tiles: [hidden / 16, words, gate, 16, in a word]."""
    numbers = NUMBERS_IN_WORD[kernel.dtype.name]
    words = kernel.reshape(len(kernel) // numbers, numbers, 4, -1, LANES)
    return words.transpose(3, 0, 2, 4, 1)


class Int8Kernel(NamedTuple):
    """A kernel of `run_step` that is rounded to 8 bits."""

    values: jax.Array  # Int8, from `pack_gates`.
    scales: jax.Array  # Multiply the integer products of each column, [4 * hidden].
    factors: jax.Array  # Multiply the inputs before they are rounded, [depth].


def quantize_gates(kernel: jax.Array, bound: float) -> tuple[Int8Kernel, jax.Array]:
    """Round a kernel [inputs + hidden, 4 * hidden] to 8 bits, with a scale for each column.

    Inputs are between minus and plus `bound`, hidden states between -1 and 1. `run_step` rounds
    both to integers from 1 to 255, where 128 represents 0. Also return the offset to add to the
    gates, which corrects for that: [4 * hidden]. The number of rows is a multiple of 4.
    """
    depth, width = kernel.shape
    factors = jnp.where(jnp.arange(depth) < depth - width // 4, 127 / bound, 127)
    kernel = kernel.astype("float32") / factors[:, None]
    scales = jnp.abs(kernel).max(axis=0) / 127
    scales = jnp.where(scales == 0, 1, scales)
    values = jnp.round(kernel / scales[None]).astype("int8")
    offset = -128 * scales * values.sum(axis=0, dtype="int32")
    return Int8Kernel(pack_gates(values), scales, factors), offset


def run_step(
    packed: jax.Array | Int8Kernel, inputs: Sequence[jax.Array], carry: LSTMCarry, added: jax.Array
) -> LSTMCarry:
    """Run one step of a layer and return the next carry.

    The kernel is from `pack_gates` or `quantize_gates`; with the latter, the step can't be
    differentiated. `inputs` holds the inputs of the layer, unless `added` includes their matmul
    with the kernel already, and the hidden state, [batch, n] each. `added` [batch or 1, 4 * hidden]
    is added to the gates before their activation.
    """
    rows = jnp.concatenate(inputs, axis=1)
    added, cell = added.astype("float32"), carry.cell.astype("float32")
    if isinstance(packed, Int8Kernel):
        rows = jnp.round(rows * packed.factors[None] + 128).astype("uint8")
        state = _call_step(rows, packed.values, added, cell, packed.scales)
    else:
        state = _differentiable_step(rows.astype(packed.dtype), packed, added, cell)
    return LSTMCarry(*(x.astype(carry.cell.dtype) for x in state))


def _call_step(
    rows: jax.Array, packed: jax.Array, added: jax.Array, cell: jax.Array, *scales: jax.Array
) -> Sequence[jax.Array]:
    result = (cell.shape, "float32")
    return _call("step", (rows, packed, added, cell, *scales), result, result)


_differentiable_step = jax.custom_jvp(_call_step)


@_differentiable_step.defjvp
def _differentiate_step(
    primals: Sequence[jax.Array], tangents: Sequence[jax.Array]
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """Differentiate the same step, computed by JAX."""

    def run(
        rows: jax.Array, packed: jax.Array, added: jax.Array, cell: jax.Array
    ) -> Sequence[jax.Array]:
        kernel = packed.transpose(1, 4, 2, 0, 3).reshape(rows.shape[1], -1)
        sums = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)  # It has a JVP.
        return [*compute_step(sums + added, cell, False)[:2]]

    return jax.jvp(run, primals, tangents)


# The kernels, the first cell state, and the gates, cell states, rows and starts of all steps.
_Residuals = tuple[Kernels, jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]


def _forward(
    kernels: Kernels, steps: Steps, carry: LSTMCarry, dtype: str
) -> tuple[tuple[jax.Array, LSTMCarry], _Residuals]:
    """Run `run_recurrence`; also return the residuals.

    Among them are `rows` [time, batch, depth], the rounded factors of the kernel: the hidden state,
    the inputs, and 1 for the bias.
    """
    inputs, starts = steps
    given = [] if starts is None else [starts]
    time, batch, _ = inputs.shape
    hidden = len(kernels.recurrent)
    parts = kernels.recurrent, kernels.input, kernels.bias[None]
    kernel = jnp.concatenate([part.astype(dtype) for part in parts])
    kernel = jnp.pad(kernel, ((0, -len(kernel) % NUMBERS_IN_WORD[dtype]), (0, 0)))
    depth, width = kernel.shape
    gates, cells, outputs, rows = _call(
        "forward",
        (inputs, pack_gates(kernel), *carry, *given),
        ((time, batch, width), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, depth), dtype),
    )
    residuals = kernels, carry.cell, gates, cells, rows, given
    return (outputs, LSTMCarry(cells[-1], outputs[-1])), residuals


def _backward(
    dtype: str, residuals: _Residuals, cotangents: tuple[jax.Array, LSTMCarry]
) -> tuple[Kernels, tuple[jax.Array, None], LSTMCarry]:
    kernels, first_cell, gates, cells, rows, given = residuals
    d_outputs, d_last = cotangents
    time, batch, depth = rows.shape
    features, hidden = len(kernels.input), len(kernels.recurrent)
    # The transposed kernel in tiles of 64 columns: [tiles, words, 64, in a word].
    numbers = NUMBERS_IN_WORD[dtype]
    rows_of_tiles = jnp.pad(kernels.recurrent.astype(dtype), ((0, -hidden % _TILE), (0, 0)))
    packed = rows_of_tiles.reshape(-1, _TILE, 4 * hidden // numbers, numbers).transpose(0, 2, 1, 3)
    d_gates, d_cell, d_hidden = _call(
        "backward",
        (gates, packed, first_cell, cells, d_outputs, *d_last, *given),
        (gates.shape, dtype),
        (first_cell.shape, "float32"),
        (first_cell.shape, "float32"),
        aliases={5: 1, 6: 2},  # The gradients of the last state become those of the first.
    )
    d_gates = d_gates.reshape(time * batch, -1)
    d_kernel = _matmul(rows.reshape(time * batch, depth).T, d_gates)
    bias = hidden + features
    d_kernels = Kernels(d_kernel[hidden:bias], d_kernel[:hidden], d_kernel[bias])
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = _matmul(d_gates, kernels.input.T.astype(dtype)).reshape(time, batch, features)
    return d_kernels, (d_inputs, None), LSTMCarry(d_cell, d_hidden)


run_recurrence.defvjp(_forward, _backward)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b in float32, for factors in float32 or bfloat16."""
    depth = a.shape[1]
    if a.dtype == jnp.float32 or depth % 2:
        return matmul_rounded(a, b)
    result, working_memory = (len(a), b.shape[1]), (native.count_threads(), depth, _TILE)
    return _call("matmul", (a, b), (result, "float32"), (working_memory, "bfloat16"))[0]


def _call(
    name: str,
    arguments: Sequence[jax.Array],
    *results: tuple[tuple[int, ...], str],
    aliases: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
    """Call a function of the library, which divides its work into a part for each thread.

    `aliases` maps an argument to the result that has its memory.
    """
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    library = native.load_library()
    assert library
    target = f"{library.name}-{name}"  # Compiled programs, including cached ones, call it by this.
    call = jax.ffi.ffi_call(target, shapes, vmap_method="sequential", input_output_aliases=aliases)
    return call(*arguments, parts=np.int64(native.count_threads()))
