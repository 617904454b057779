"""Run a gated recurrence in XLA on GPUs and TPUs: few GPU kernels a step.

The time of a small layer on a GPU depends mostly on how many GPU kernels each step launches: here
at most six, the loop counter included (`benchmarks/accelerators.py` counts them):

- The matmul of the inputs is computed for all steps before the loop, and the gradients of kernels
  are matmuls after the backward loop.
- A step saves one array for the backward pass, its derivatives, so that a backward step has little
  to compute. The gradients of a backward step are one array, too.
- No array is padded or converted in a loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lstm_jax.matmul import matmul, matmul_rounded, round_factor
from lstm_jax.ops.gates import Arrays, Gating
from lstm_jax.ops.scan import (
    Layer,
    Marks,
    add_hidden,
    add_sums,
    clear,
    differentiate_peepholes,
    get_peepholes,
    keep,
    select_sums,
)

_DEPTH = 256  # XLA pads the depth of some matmuls to a multiple of it.


class Loops(NamedTuple):
    """The two loops over time of a layer with a rounded recurrent kernel.

    `forward` takes the layer, with the inputs' terms in the sums as its inputs, and whether to save
    derivatives; it returns the last carry and what `save_step` saves at each step. `backward` takes
    the layer, what was saved, and the cotangents of the last carry and of the outputs; it returns
    the rounded cotangents of the sums, and the cotangent of the first carry.
    """

    forward: Callable[..., tuple[Any, Array]]
    backward: Callable[..., tuple[Array, Any]]


def forward(
    layer: Layer, differentiable: bool, loops: Loops
) -> tuple[tuple[Any, Float[Array, "time batch hidden"]], tuple[Array]]:
    """Return the last carry and the outputs, and what each step saves for the backward pass.

    It is complete if `differentiable`.
    """
    params = layer.params
    added = matmul(layer.inputs, params.input_kernel, layer.dtype, params.bias)
    last, saved = loops.forward(_round(layer)._replace(inputs=added), differentiable)
    outputs = saved[..., -len(params.recurrent_kernel) :]
    return (last._replace(hidden=outputs[-1]), outputs), (saved,)


def _round(layer: Layer) -> Layer:
    kernel = round_factor(layer.params.recurrent_kernel, layer.dtype)
    return layer._replace(params=layer.params._replace(recurrent_kernel=kernel))


def backward(
    layer: Layer,
    saved: tuple[Array],
    d_last: Any,
    d_outputs: Float[Array, "time batch hidden"],
    loops: Loops,
) -> tuple[Float[Array, "time batch sums"], Any]:
    """Return the cotangents of the sums, [time, batch, sums * hidden], and of the first carry.

    `d_last` and `d_outputs` are those of the last carry and of the outputs.
    """
    return loops.backward(_round(layer), *saved, d_last, d_outputs)


def differentiate_params(
    layer: Layer, saved: tuple[Array], d_sums: Float[Array, "time batch sums"]
) -> tuple[Any, Float[Array, "time batch features"]]:
    """Return the cotangents of the parameters and inputs, from those of the sums."""
    gating, params, inputs, carry, marks, dtype = layer
    size, dtype_of_sums = len(params.recurrent_kernel), saved[0].dtype
    parts = jnp.split(saved[0], saved[0].shape[2] // size, axis=2)
    before = clear(jnp.concatenate([carry.hidden[None], parts[-1][:-1]]), marks.reset)
    rows = d_sums.reshape(-1, d_sums.shape[2])
    by_inputs, by_hidden = (
        select_sums(rows, indices, size) for indices in (gating.read_inputs, gating.read_hidden)
    )
    pairs = (inputs, by_inputs), (before, by_hidden)
    d_kernels = [
        matmul_rounded(round_factor(factor, dtype).reshape(len(d), -1).T, d) for factor, d in pairs
    ]
    d_bias = d_sums.sum(axis=(0, 1), dtype=dtype_of_sums)
    d_others = list(gating.split_biases(d_bias))
    if gating.has_peepholes:
        d_others.append(differentiate_peepholes(layer, d_sums.astype(dtype_of_sums), parts[-2]))
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = matmul_rounded(by_inputs, round_factor(params.input_kernel.T, dtype))
    return gating.params(*d_kernels, *d_others), d_inputs.reshape(inputs.shape)


def save_step(gating: Gating, factors: Arrays, after: Any) -> Array:
    """Return the array that a step saves, [batch, n * hidden]: factors, c' if needed, and h'."""
    cell = [after.cell] if gating.has_peepholes else []
    return jnp.concatenate([*factors, *cell, after.hidden], axis=1)


def _forward_loop(layer: Layer, differentiable: bool) -> tuple[Any, Array]:
    gating, params, added, carry, marks, _ = layer
    kernel, peepholes = params.recurrent_kernel, get_peepholes(params, axis=0)
    # A frozen step leaves all bits of the hidden state; otherwise only matmuls read it.
    dtype = kernel.dtype if marks.frozen is None else added.dtype

    def step(state: Any, read: tuple[Array, Marks]) -> tuple[Any, Array]:
        added, mark = read
        product = matmul_rounded(state.hidden.astype(kernel.dtype), kernel)
        sums = add_sums(gating, params, added, clear(product, mark.reset))
        state = state._replace(hidden=state.hidden.astype(added.dtype))
        before = clear(state, mark.reset)
        gates, after = gating.activate(sums, before, peepholes)
        factors = gating.derive(gates, before, after, peepholes) if differentiable else ()
        after = keep(state, after, mark.frozen)
        saved = save_step(gating, factors, after)
        return after._replace(hidden=after.hidden.astype(dtype)), saved

    rounded = carry._replace(hidden=carry.hidden.astype(dtype))
    return lax.scan(step, rounded, (added, marks))


def _backward_loop(layer: Layer, saved: Array, d_last: Any, d_outputs: Array) -> tuple[Array, Any]:
    gating, marks, kernel = layer.gating, layer.marks, layer.params.recurrent_kernel
    steps, batch, hidden = d_outputs.shape
    width = gating.num_sums * hidden
    zeros = jnp.zeros_like(d_last.hidden)
    # Which parts of the carry's cotangent do not come from the matmul of a step.
    keeps_hidden = marks.frozen is not None or gating.keeps_hidden
    kept = d_last._replace(hidden=zeros if keeps_hidden else None)
    parts = len(_split(zeros, kernel.dtype))
    leaves, structure = jax.tree.flatten(kept)
    tail = len(leaves) * parts * hidden
    # The matmul of a step reads a whole row [batch, depth]; zeros skip what h U is not added to.
    depth = -(-(width + tail) // _DEPTH) * _DEPTH
    rows_of_sums = jnp.zeros((gating.num_sums, hidden, hidden), kernel.dtype)
    blocks = jnp.stack(jnp.split(kernel.T, len(gating.read_hidden)))
    rows_of_sums = rows_of_sums.at[jnp.array(gating.read_hidden)].set(blocks)
    padded = jnp.pad(rows_of_sums.reshape(width, hidden), ((0, depth - width), (0, 0)))

    def make_row(d_sums: Arrays, d_carry: Any) -> Array:
        """Return the rounded cotangents of the sums, and those of the carry by `_split`."""
        row = [d.astype(kernel.dtype) for d in d_sums]
        row += [part for d in jax.tree.leaves(d_carry) for part in _split(d, kernel.dtype)]
        filler = jnp.zeros((batch, depth - width - tail), kernel.dtype)
        return jnp.concatenate([*row, filler], axis=1)

    def read_carry(row: Array) -> Any:
        halves = row[:, width : width + tail].astype(d_last.hidden.dtype)
        sums = halves.reshape(batch, len(leaves), parts, hidden).sum(axis=2)
        return jax.tree.unflatten(structure, [sums[:, i] for i in range(len(leaves))])

    def step(carry: tuple[Array, Array], read: tuple[Any, ...]) -> tuple[tuple[Array, Array], None]:
        rows, product = carry
        t, saved, mark, d_output = read
        # Not from the carry: that would launch one more GPU kernel.
        d_after = read_carry(lax.dynamic_index_in_dim(rows, t + 1, keepdims=False))
        d_after = add_hidden(d_after, product + d_output)
        factors = jnp.split(saved, saved.shape[1] // hidden, axis=1)[: gating.num_factors]
        d_sums, d_before = gating.pull_back(tuple(factors), d_after)
        if mark.frozen is not None:
            d_sums = keep(tuple(map(jnp.zeros_like, d_sums)), d_sums, mark.frozen)
            d_before = keep(d_after, add_hidden(d_before, zeros), mark.frozen)
        row = make_row(d_sums, clear(d_before, mark.reset))
        row = lax.optimization_barrier(row)  # So that one GPU kernel makes it.
        rows = lax.dynamic_update_index_in_dim(rows, row, t, 0)
        return (rows, clear(matmul_rounded(row, padded), mark.reset)), None

    last = make_row((zeros,) * gating.num_sums, kept)
    rows = jnp.zeros((steps + 1, batch, depth), kernel.dtype).at[-1].set(last)
    read = jnp.arange(steps), saved, marks, d_outputs
    (rows, product), _ = lax.scan(step, (rows, d_last.hidden), read, reverse=True)
    return rows[:-1, :, :width], add_hidden(read_carry(rows[0]), product)


LOOPS = Loops(_forward_loop, _backward_loop)


def _split(x: Array, dtype: jax.typing.DTypeLike) -> list[Array]:
    """Return arrays of `dtype` whose sum is x: in bfloat16 two, for a precision of 16 bits."""
    if dtype == x.dtype:
        return [x]
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(dtype), (x - high).astype(dtype)]
