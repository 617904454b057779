"""One LSTM layer over time, by the library's functions, with a custom VJP."""

from typing import Any

import jax
import jax.numpy as jnp

from lstm_jax.cells.lstm import Kernels, LSTMCarry
from lstm_jax.matmul import matmul_rounded
from lstm_jax.native import get_target

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
    gates, cells, outputs, rows, _ = _call(
        "forward",
        (inputs, kernel, *carry),
        ((time, batch, width), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, depth), "bfloat16"),
        ((depth, width), "bfloat16"),
    )
    return (outputs, LSTMCarry(cells[-1], outputs[-1])), (kernels, carry.cell, gates, cells, rows)


def _backward(
    residuals: tuple[Any, ...], cotangents: tuple[jax.Array, LSTMCarry]
) -> tuple[Kernels, jax.Array, LSTMCarry]:
    kernels, first_cell, gates, cells, rows = residuals
    d_outputs, d_last = cotangents
    time, batch, depth = rows.shape
    features, hidden = len(kernels.input), len(kernels.recurrent)
    d_gates, d_cell, d_hidden, _ = _call(
        "backward",
        (gates, kernels.recurrent.astype("bfloat16"), first_cell, cells, d_outputs, *d_last),
        (gates.shape, "bfloat16"),
        (first_cell.shape, "float32"),
        (first_cell.shape, "float32"),
        ((4 * hidden, -(-hidden // _TILE) * _TILE), "bfloat16"),
    )
    d_gates = d_gates.reshape(time * batch, -1)
    d_kernel = _matmul(rows.reshape(time * batch, depth).T, d_gates)
    bias = hidden + features
    d_kernels = Kernels(d_kernel[hidden:bias], d_kernel[:hidden], d_kernel[bias])
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = _matmul(d_gates, kernels.input.T.astype("bfloat16"))
    return d_kernels, d_inputs.reshape(time, batch, features), LSTMCarry(d_cell, d_hidden)


run_recurrence.defvjp(_forward, _backward)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b in float32, for bfloat16 factors."""
    depth = a.shape[1]
    if depth % 2:
        return matmul_rounded(a, b)
    shape = len(a), b.shape[1]
    return _call("matmul", (a, b), (shape, "float32"), ((depth, _TILE), "bfloat16"))[0]


def _call(name: str, arguments: tuple[jax.Array, ...], *results: tuple[Any, str]) -> Any:
    """Call a function of the library. Its last result is its working memory."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    target = get_target(name)
    return jax.ffi.ffi_call(target, shapes, vmap_method="sequential")(*arguments)
