"""Run one LSTM layer on GPUs and TPUs: few GPU kernels a step, and a custom VJP.

The time of a small layer on a GPU depends mostly on how many GPU kernels each step launches: here
at most five, the loop counter included (`benchmarks/accelerators.py` counts them):

- The matmul of the inputs is computed for all steps before the loop, and the gradients of kernels
  are matmuls after the backward loop.
- A step keeps one array for the backward pass, its derivatives, so that a backward step has little
  to compute. The gradients of a backward step are one array, too.
- No array is padded or converted in a loop.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.cells.lstm import Kernels, LSTMCarry
from lstm_jax.matmul import matmul, matmul_rounded, round_factor

_DEPTH = 256  # XLA pads the depth of some matmuls to a multiple of it.

# Inputs [time, ...] of all steps, and where a step reads zeros instead of the carry, bool [time,
# batch]; None is nowhere.
Steps = tuple[jax.Array, jax.Array | None]


class Loops(NamedTuple):
    """The two loops over time of a layer, whose arrays are [time, batch, n] or [batch, n].

    `forward` takes the rounded recurrent kernel, the terms of the inputs and the bias in the gates,
    the first carry, and whether to keep derivatives; it returns what `compute_step` keeps at each
    step, and the last cell state. `backward` takes the same kernel, what was kept, and the
    cotangents of the outputs and of the last carry; it returns the rounded cotangents of the gate
    pre-activations, and the cotangent of the first carry. Their second argument is `Steps`: the
    terms or what was kept, with the starts of documents.
    """

    forward: Callable[[jax.Array, Steps, LSTMCarry, bool], tuple[jax.Array, jax.Array]]
    backward: Callable[[jax.Array, Steps, jax.Array, LSTMCarry], tuple[jax.Array, LSTMCarry]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def run_recurrence(
    kernels: Kernels, steps: Steps, carry: LSTMCarry, dtype: str, loops: Loops
) -> tuple[jax.Array, LSTMCarry]:
    """Run one layer: [time, batch, features] → [time, batch, hidden], and the carry.

    The factors of matmuls are rounded to `dtype`. The gradient can't be differentiated again.
    """
    return _forward(kernels, steps, carry, dtype, loops, differentiable=False)[0]


# The arguments, and what the forward loop kept.
_Residuals = tuple[Kernels, Steps, LSTMCarry, jax.Array]


def _forward(
    kernels: Kernels,
    steps: Steps,
    carry: LSTMCarry,
    dtype: str,
    loops: Loops,
    differentiable: bool = True,
) -> tuple[tuple[jax.Array, LSTMCarry], _Residuals]:
    """Run `run_recurrence`; also return the residuals, which are complete if `differentiable`."""
    inputs, starts = steps
    added = matmul(inputs, kernels.input, dtype, kernels.bias), starts
    kernel = round_factor(kernels.recurrent, dtype)
    kept, cell = loops.forward(kernel, added, carry, differentiable)
    outputs = kept[..., -len(kernel) :]
    return (outputs, LSTMCarry(cell, outputs[-1])), (kernels, steps, carry, kept)


def _backward(
    dtype: str, loops: Loops, residuals: _Residuals, cotangents: tuple[jax.Array, LSTMCarry]
) -> tuple[Kernels, tuple[jax.Array, None], LSTMCarry]:
    kernels, (inputs, starts), first, kept = residuals
    kernel = round_factor(kernels.recurrent, dtype)
    d_sums, d_first = loops.backward(kernel, (kept, starts), *cotangents)
    d_sums = d_sums.reshape(-1, d_sums.shape[2])
    *_, outputs = jnp.split(kept, 7, axis=2)
    hidden_before = clear(jnp.concatenate([first.hidden[None], outputs[:-1]]), starts)
    d_input, d_recurrent = (
        matmul_rounded(round_factor(factor, dtype).reshape(len(d_sums), -1).T, d_sums)
        for factor in (inputs, hidden_before)
    )
    d_kernels = Kernels(d_input, d_recurrent, d_sums.sum(axis=0, dtype=kept.dtype))
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = matmul_rounded(d_sums, round_factor(kernels.input.T, dtype))
    return d_kernels, (d_inputs.reshape(inputs.shape), None), d_first


run_recurrence.defvjp(_forward, _backward)


def clear(x: jax.Array, starts: jax.Array | None, axis: int = -1) -> jax.Array:
    """Return x, zero where `starts`, bool without the axis of features, is true."""
    return x if starts is None else jnp.where(jnp.expand_dims(starts, axis), 0, x)


def compute_step(
    sums: jax.Array, cell: jax.Array, differentiable: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the next cell state and hidden state, and the array to keep for the backward pass.

    The latter is h', [batch, hidden], or if `differentiable` [batch, 7 * hidden]: the derivatives
    of c' by the pre-activations of i, f and g, of h' by that of o, dh'/dc', dc'/dc, and h'.
    """
    i, f, g, o = jnp.split(sums, 4, axis=1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    by_sums = g * i * (1 - i), cell * f * (1 - f), i * (1 - g**2)
    cell = f * cell + i * g
    activated = jnp.tanh(cell)
    hidden = o * activated
    kept = [*by_sums, hidden * (1 - o), o * (1 - activated**2), f] if differentiable else []
    return cell, hidden, jnp.concatenate([*kept, hidden], axis=1)


def differentiate_step(
    kept: jax.Array, d_cell: jax.Array, d_hidden: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Return the cotangents of the gate pre-activations, and of the cell state before a step.

    The arguments are what `compute_step` kept, and the cotangents of the states after the step.
    """
    *by_sums, by_o, by_cell, f, _ = jnp.split(kept, 7, axis=1)
    d_cell = d_cell + d_hidden * by_cell
    return [*(d_cell * x for x in by_sums), d_hidden * by_o], d_cell * f


def _forward_loop(
    kernel: jax.Array, added: Steps, carry: LSTMCarry, differentiable: bool
) -> tuple[jax.Array, jax.Array]:
    def step(state: LSTMCarry, added: Steps) -> tuple[LSTMCarry, jax.Array]:
        terms, start = added
        sums = clear(matmul_rounded(state.hidden, kernel), start) + terms
        cell, hidden, kept = compute_step(sums, clear(state.cell, start), differentiable)
        return LSTMCarry(cell, hidden.astype(kernel.dtype)), kept

    rounded = carry._replace(hidden=carry.hidden.astype(kernel.dtype))
    last, kept = lax.scan(step, rounded, added)
    return kept, last.cell


def _backward_loop(
    kernel: jax.Array, all_kept: Steps, d_outputs: jax.Array, d_last: LSTMCarry
) -> tuple[jax.Array, LSTMCarry]:
    steps, batch, hidden = d_outputs.shape
    width, parts = 4 * hidden, len(_split(d_last.cell, kernel.dtype))
    # The matmul of a step reads a whole row [batch, depth]; zeros skip what is not of a gate.
    depth = -(-(width + hidden * parts) // _DEPTH) * _DEPTH
    padded = jnp.pad(kernel.T, ((0, depth - width), (0, 0)))

    def make_row(d_sums: list[jax.Array], d_cell: jax.Array) -> jax.Array:
        """Return the rounded cotangents of the sums, and that of the cell state by `_split`."""
        row = [*(d.astype(kernel.dtype) for d in d_sums), *_split(d_cell, kernel.dtype)]
        filler = jnp.zeros((batch, depth - width - hidden * parts), kernel.dtype)
        return jnp.concatenate([*row, filler], axis=1)

    def get_d_cell(row: jax.Array) -> jax.Array:
        d_cell = row[:, width : width + hidden * parts].astype(d_last.cell.dtype)
        return d_cell.reshape(batch, parts, hidden).sum(axis=1)

    def step(
        carry: tuple[jax.Array, jax.Array], read: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        rows, d_hidden = carry
        t, (kept, start), d_output = read
        # Not from the carry: that would launch one more GPU kernel.
        d_cell = get_d_cell(lax.dynamic_index_in_dim(rows, t + 1, keepdims=False))
        d_sums, d_cell = differentiate_step(kept, d_cell, d_hidden + d_output)
        row = make_row(d_sums, clear(d_cell, start))
        row = lax.optimization_barrier(row)  # So that one GPU kernel makes it.
        rows = lax.dynamic_update_index_in_dim(rows, row, t, 0)
        return (rows, clear(matmul_rounded(row, padded), start)), None

    last = make_row(4 * [jnp.zeros_like(d_last.cell)], d_last.cell)
    rows = jnp.zeros((steps + 1, batch, depth), kernel.dtype).at[-1].set(last)
    read = jnp.arange(steps), all_kept, d_outputs
    (rows, d_hidden), _ = lax.scan(step, (rows, d_last.hidden), read, reverse=True)
    return rows[:-1, :, :width], LSTMCarry(get_d_cell(rows[0]), d_hidden)


LOOPS = Loops(_forward_loop, _backward_loop)


def _split(x: jax.Array, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """Return arrays of `dtype` whose sum is x: in bfloat16 two, for a precision of 16 bits."""
    if dtype == x.dtype:
        return [x]
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(dtype), (x - high).astype(dtype)]
