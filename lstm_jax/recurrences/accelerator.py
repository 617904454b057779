"""Run one LSTM layer on GPUs and TPUs: few kernels a step, and a custom VJP.

The time of a small layer on a GPU is mostly the number of kernels that each step starts. Here that
is at most five, the loop counter included (`benchmarks/accelerators.py` counts them):

- The matmul of the inputs is computed for all steps before the loop, and the gradients of kernels
  are matmuls after the backward loop.
- A step keeps one array for the backward pass, its derivatives, so that a backward step has little
  to compute. The gradients of a backward step are one array, too.
- No array is padded or converted in a loop.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.cells.lstm import Kernels, LSTMCarry
from lstm_jax.matmul import matmul, matmul_rounded, round_factor

_DEPTH = 256  # XLA pads the depth of some matmuls to a multiple of it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def run_recurrence(
    kernels: Kernels, inputs: jax.Array, carry: LSTMCarry, dtype: str
) -> tuple[jax.Array, LSTMCarry]:
    """Run one layer: [time, batch, features] → [time, batch, hidden], and the carry.

    The factors of matmuls are rounded to `dtype`. The gradient can't be differentiated again.
    """
    outputs, cell = _run(kernels, inputs, carry, dtype, differentiable=False)
    return outputs, LSTMCarry(cell, outputs[-1])


def _run(
    kernels: Kernels, inputs: jax.Array, carry: LSTMCarry, dtype: str, differentiable: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs [time, batch, hidden] and the last cell state.

    If `differentiable`, the outputs follow the derivatives of the step, in an array [time, batch,
    7 * hidden]: of c' by the sums of i, f and g; of h' by the sum of o; of h' by c'; of c' by c.
    """
    kernel = round_factor(kernels.recurrent, dtype)

    def step(
        carry: tuple[jax.Array, jax.Array], added: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        cell, rounded = carry
        i, f, g, o = jnp.split(matmul_rounded(rounded, kernel) + added, 4, axis=1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        by_sums = g * i * (1 - i), cell * f * (1 - f), i * (1 - g**2)
        cell = f * cell + i * g
        activated = jnp.tanh(cell)
        hidden = o * activated
        kept = [*by_sums, hidden * (1 - o), o * (1 - activated**2), f] if differentiable else []
        return (cell, round_factor(hidden, dtype)), jnp.concatenate([*kept, hidden], axis=1)

    first = carry.cell, round_factor(carry.hidden, dtype)
    added = matmul(inputs, kernels.input, dtype, kernels.bias)
    (cell, _), kept = lax.scan(step, first, added)
    return kept, cell


# The arguments, and what `_run` returns.
_Residuals = tuple[Kernels, jax.Array, LSTMCarry, jax.Array]


def _forward(
    kernels: Kernels, inputs: jax.Array, carry: LSTMCarry, dtype: str
) -> tuple[tuple[jax.Array, LSTMCarry], _Residuals]:
    kept, cell = _run(kernels, inputs, carry, dtype, differentiable=True)
    *_, outputs = jnp.split(kept, 7, axis=2)
    return (outputs, LSTMCarry(cell, outputs[-1])), (kernels, inputs, carry, kept)


def _backward(
    dtype: str, residuals: _Residuals, cotangents: tuple[jax.Array, LSTMCarry]
) -> tuple[Kernels, jax.Array, LSTMCarry]:
    kernels, inputs, first, kept = residuals
    d_outputs, d_last = cotangents
    steps, batch, hidden = d_outputs.shape
    width = 4 * hidden

    # The matmul of a step reads a whole row [batch, depth]; zeros skip what is not of a gate.
    depth = -(-(width + hidden * (1 if dtype == "float32" else 2)) // _DEPTH) * _DEPTH
    kernel = jnp.pad(kernels.recurrent.T, ((0, depth - width), (0, 0)))
    kernel = round_factor(kernel, dtype)

    def make_row(d_sums: list[jax.Array], d_cell: jax.Array) -> jax.Array:
        """Return the rounded gradients of the gates, and that of the cell state by `_split`."""
        row = [*(round_factor(d, dtype) for d in d_sums), *_split(d_cell, dtype)]
        filler = depth - sum(part.shape[1] for part in row)
        return jnp.concatenate([*row, jnp.zeros((batch, filler), kernel.dtype)], axis=1)

    def get_d_cell(row: jax.Array) -> jax.Array:
        parts = row[:, width:].astype(kept.dtype)
        if dtype == "float32":
            return parts[:, :hidden]
        return parts[:, :hidden] + parts[:, hidden : 2 * hidden]

    def step(
        carry: tuple[jax.Array, jax.Array], read: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        rows, d_hidden = carry
        t, kept, d_output = read
        *by_sums, by_o, by_cell, f, _ = jnp.split(kept, 7, axis=1)
        d_hidden = d_hidden + d_output
        # Not from the carry: that would be one more kernel.
        d_cell = get_d_cell(lax.dynamic_index_in_dim(rows, t + 1, keepdims=False))
        d_cell = d_cell + d_hidden * by_cell
        d_sums = [*(d_cell * x for x in by_sums), d_hidden * by_o]
        row = lax.optimization_barrier(make_row(d_sums, d_cell * f))  # One kernel.
        rows = lax.dynamic_update_index_in_dim(rows, row, t, 0)
        return (rows, matmul_rounded(row, kernel)), None

    last = make_row(4 * [jnp.zeros_like(d_last.cell)], d_last.cell)
    rows = jnp.zeros((steps + 1, batch, depth), kernel.dtype).at[-1].set(last)
    read = jnp.arange(steps), kept, d_outputs
    (rows, d_hidden), _ = lax.scan(step, (rows, d_last.hidden), read, reverse=True)

    d_sums = rows[:-1, :, :width].reshape(steps * batch, width)
    *_, outputs = jnp.split(kept, 7, axis=2)
    hidden_before = jnp.concatenate([first.hidden[None], outputs[:-1]])
    d_input, d_recurrent = (
        matmul_rounded(round_factor(factor, dtype).reshape(steps * batch, -1).T, d_sums)
        for factor in (inputs, hidden_before)
    )
    d_kernels = Kernels(d_input, d_recurrent, d_sums.sum(axis=0, dtype=kept.dtype))
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = matmul_rounded(d_sums, round_factor(kernels.input.T, dtype))
    return d_kernels, d_inputs.reshape(inputs.shape), LSTMCarry(get_d_cell(rows[0]), d_hidden)


run_recurrence.defvjp(_forward, _backward)


def _split(x: jax.Array, dtype: str) -> list[jax.Array]:
    """Return arrays of `dtype` whose sum is x: in bfloat16 two, for a precision of 16 bits."""
    if dtype == "float32":
        return [x]
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(dtype), (x - high).astype(dtype)]
