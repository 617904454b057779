"""One LSTM layer by the library's functions: over time, with a custom VJP, and a single step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import native
from lstm_jax.cells.lstm import Kernels, LSTMCarry
from lstm_jax.matmul import matmul_rounded

LANES, _TILE = 16, 64  # As in lstm.c.


@jax.custom_vjp
def run_recurrence(
    kernels: Kernels, inputs: jax.Array, carry: LSTMCarry
) -> tuple[jax.Array, LSTMCarry]:
    """Run one layer: [time, batch, features] → [time, batch, hidden], and the carry.

    All arrays are float32, the factors of matmuls are rounded to bfloat16, and the hidden size is a
    multiple of `LANES`.
    """
    return _forward(kernels, inputs, carry)[0]


def pack_gates(kernel: jax.Array) -> jax.Array:
    """Round a kernel [depth, 4 * hidden], and arrange it in tiles of four gates."""
    return _pack(kernel, apart=kernel.shape[1] // 4)


class Int8Kernel(NamedTuple):
    """A kernel of `run_step` that is rounded to 8 bits."""

    values: jax.Array  # Int8, in tiles [hidden / 16, depth / 4, 4 gates, 16, 4].
    scales: jax.Array  # What 1 stands for in the products of each column, [4 * hidden].
    factors: jax.Array  # Multiply the inputs before they are rounded, [depth].


def quantize_gates(kernel: jax.Array, bound: float) -> tuple[Int8Kernel, jax.Array]:
    """Round a kernel [inputs + hidden, 4 * hidden] to 8 bits, with a scale for each column.

    Inputs are between minus and plus `bound`, hidden states between -1 and 1. `run_step` rounds
    both to integers from 1 to 255. Also return what is to be added to the gates for that, because
    128 stands for 0: [4 * hidden]. The number of rows is a multiple of 4.
    """
    depth, width = kernel.shape
    factors = jnp.where(jnp.arange(depth) < depth - width // 4, 127 / bound, 127)
    kernel = kernel.astype("float32") / factors[:, None]
    scales = jnp.abs(kernel).max(axis=0) / 127
    scales = jnp.where(scales == 0, 1, scales)
    values = jnp.round(kernel / scales).astype("int8")
    offset = -128 * scales * values.sum(axis=0, dtype="int32")
    tiles = values.reshape(depth // 4, 4, 4, -1, LANES).transpose(3, 0, 2, 4, 1)
    return Int8Kernel(tiles, scales, factors), offset


def run_step(
    packed: jax.Array | Int8Kernel, inputs: Sequence[jax.Array], carry: LSTMCarry, added: jax.Array
) -> LSTMCarry:
    """Run one step of a layer and return the next carry.

    The kernel is from `pack_gates` or `quantize_gates`. `inputs` are the layer's, unless they are
    in `added` already, and the hidden state, [batch, n] each. `added` [batch or 1, 4 * hidden] is
    added to the gates before their activation.
    """
    rows = jnp.concatenate(inputs, axis=1)
    arguments = [added.astype("float32"), carry.cell.astype("float32")]
    if isinstance(packed, Int8Kernel):
        rows = jnp.round(rows * packed.factors + 128).astype("uint8")
        arguments = [rows, packed.values, *arguments, packed.scales]
    else:
        arguments = [rows.astype("bfloat16"), packed, *arguments]
    result = (carry.cell.shape, "float32")
    return LSTMCarry(
        *(x.astype(carry.cell.dtype) for x in _call("step", arguments, result, result))
    )


def is_used(hidden_size: int, dtype: str) -> bool:
    """Return whether the library is used for layers of this size, because it is faster."""
    return dtype == "bfloat16" and fits(hidden_size) and jax.default_backend() == "cpu"


def fits(hidden_size: int) -> bool:
    """Return whether the library exists, and supports layers of this size."""
    return hidden_size % LANES == 0 and bool(native.load_library())


def _forward(
    kernels: Kernels, inputs: jax.Array, carry: LSTMCarry
) -> tuple[tuple[jax.Array, LSTMCarry], tuple[Any, ...]]:
    """Run `run_recurrence`; also return the residuals.

    Among them are `rows` [time, batch, depth], the rounded factors of the kernel: the hidden state,
    the inputs, and 1 for the bias.
    """
    time, batch, _ = inputs.shape
    hidden = len(kernels.recurrent)
    parts = kernels.recurrent, kernels.input, kernels.bias[None]
    kernel = jnp.concatenate([part.astype("bfloat16") for part in parts])
    kernel = jnp.pad(kernel, ((0, len(kernel) % 2), (0, 0)))
    depth, width = kernel.shape
    gates, cells, outputs, rows = _call(
        "forward",
        (inputs, pack_gates(kernel), *carry),
        ((time, batch, width), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, depth), "bfloat16"),
    )
    return (outputs, LSTMCarry(cells[-1], outputs[-1])), (kernels, carry.cell, gates, cells, rows)


def _backward(
    residuals: tuple[Any, ...], cotangents: tuple[jax.Array, LSTMCarry]
) -> tuple[Kernels, jax.Array, LSTMCarry]:
    kernels, first_cell, gates, cells, rows = residuals
    d_outputs, d_last = cotangents
    time, batch, depth = rows.shape
    features, hidden = len(kernels.input), len(kernels.recurrent)
    d_gates, d_cell, d_hidden = _call(
        "backward",
        (gates, _pack(kernels.recurrent.T), first_cell, cells, d_outputs, *d_last),
        (gates.shape, "bfloat16"),
        (first_cell.shape, "float32"),
        (first_cell.shape, "float32"),
    )
    d_gates = d_gates.reshape(time * batch, -1)
    d_kernel = _matmul(rows.reshape(time * batch, depth).T, d_gates)
    bias = hidden + features
    d_kernels = Kernels(d_kernel[hidden:bias], d_kernel[:hidden], d_kernel[bias])
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = _matmul(d_gates, kernels.input.T.astype("bfloat16"))
    return d_kernels, d_inputs.reshape(time, batch, features), LSTMCarry(d_cell, d_hidden)


run_recurrence.defvjp(_forward, _backward)


def _pack(b: jax.Array, apart: int = LANES) -> jax.Array:
    """Round b [depth, width], and arrange it in tiles of four vectors, adjacent or `apart`."""
    depth, width = b.shape
    shape = -(-width // _TILE), depth, _TILE
    (packed,) = _call("pack", (b.astype("bfloat16"),), (shape, "bfloat16"), apart=np.int64(apart))
    return packed


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b in float32, for bfloat16 factors."""
    depth = a.shape[1]
    if depth % 2:
        return matmul_rounded(a, b)
    result, working_memory = (len(a), b.shape[1]), (native.count_threads(), depth, _TILE)
    return _call("matmul", (a, b), (result, "float32"), (working_memory, "bfloat16"))[0]


def _call(
    name: str, arguments: Sequence[jax.Array], *results: tuple[Any, str], **attributes: np.int64
) -> Any:
    """Call a function of the library, which divides its work into a part for each thread."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    call = jax.ffi.ffi_call(native.get_target(name), shapes, vmap_method="sequential")
    return call(*arguments, parts=np.int64(native.count_threads()), **attributes)
