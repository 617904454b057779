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

from lstm_jax.matmul import matmul, matmul_rounded, round_factor
from lstm_jax.ops.gates import Arrays, Gating
from lstm_jax.ops.scan import Marks, add_hidden, add_sums, clear, get_peepholes, keep

_DEPTH = 256  # XLA pads the depth of some matmuls to a multiple of it.


class Loops(NamedTuple):
    """The two loops over time of a layer, whose arrays are [time, batch, n] or [batch, n].

    `forward` takes the gating, the parameters with a rounded recurrent kernel, the inputs' terms in
    the sums, the first carry, the marks, and whether to save derivatives; it returns the last carry
    and what `save_step` saves at each step. `backward` takes the gating, the rounded recurrent
    kernel, what was saved, the marks, and the cotangents of the last carry and of the outputs; it
    returns the rounded cotangents of the sums, and the cotangent of the first carry.
    """

    forward: Callable[..., tuple[Any, jax.Array]]
    backward: Callable[..., tuple[jax.Array, Any]]


def forward(
    gating: Gating,
    params: Any,
    inputs: jax.Array,
    carry: Any,
    marks: Marks,
    dtype: str,
    differentiable: bool,
    loops: Loops,
) -> tuple[tuple[Any, jax.Array], tuple[jax.Array]]:
    """Run a layer: inputs [time, batch, features] → last carry, outputs [time, batch, hidden].

    The factors of matmuls are rounded to `dtype`. Also return what each step saves, which the
    backward pass needs; it is complete if `differentiable`.
    """
    added = matmul(inputs, params.input_kernel, dtype, params.bias)
    rounded = params._replace(recurrent_kernel=round_factor(params.recurrent_kernel, dtype))
    last, saved = loops.forward(gating, rounded, added, carry, marks, differentiable)
    outputs = saved[..., -len(params.recurrent_kernel) :]
    return (last._replace(hidden=outputs[-1]), outputs), (saved,)


def backward(
    gating: Gating,
    params: Any,
    carry: Any,
    marks: Marks,
    saved: tuple[jax.Array],
    d_last: Any,
    d_outputs: jax.Array,
    dtype: str,
    loops: Loops,
) -> tuple[jax.Array, Any]:
    """Return the cotangents of the sums, [time, batch, sums * hidden], and of the first carry.

    `d_last` and `d_outputs` [time, batch, hidden] are those of the last carry and of the outputs.
    """
    kernel = round_factor(params.recurrent_kernel, dtype)
    return loops.backward(gating, kernel, *saved, marks, d_last, d_outputs)


def differentiate_params(
    gating: Gating,
    params: Any,
    inputs: jax.Array,
    carry: Any,
    marks: Marks,
    saved: tuple[jax.Array],
    d_sums: jax.Array,
    dtype: str,
) -> tuple[Any, jax.Array]:
    """Return the cotangents of the parameters and inputs, from those of the sums."""
    size, dtype_of_sums = len(params.recurrent_kernel), saved[0].dtype
    *_, outputs = jnp.split(saved[0], saved[0].shape[2] // size, axis=2)
    before = clear(jnp.concatenate([carry.hidden[None], outputs[:-1]]), marks.reset)
    parts = jnp.split(d_sums.reshape(-1, d_sums.shape[2]), gating.num_sums, axis=1)

    def select(indices: tuple[int, ...]) -> jax.Array:
        is_all = len(indices) == gating.num_sums
        of_sums = [parts[i] for i in indices]
        return d_sums.reshape(-1, d_sums.shape[2]) if is_all else jnp.concatenate(of_sums, axis=1)

    pairs = (inputs, select(gating.read_inputs)), (before, select(gating.read_hidden))
    d_kernels = [
        matmul_rounded(round_factor(factor, dtype).reshape(len(d), -1).T, d) for factor, d in pairs
    ]
    d_bias = d_sums.sum(axis=(0, 1), dtype=dtype_of_sums)
    d_others = list(gating.split_biases(d_bias))
    if gating.has_peepholes:
        cells = jnp.split(saved[0], saved[0].shape[2] // size, axis=2)[-2]
        earlier = clear(jnp.concatenate([carry.cell[None], cells[:-1]]), marks.reset)
        d_i, d_f, _, d_o = jnp.split(d_sums.astype(dtype_of_sums), 4, axis=2)
        terms = d_i * earlier, d_f * earlier, d_o * cells
        d_others.append(jnp.stack([term.sum(axis=(0, 1)) for term in terms]))
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = matmul_rounded(
        select(gating.read_inputs), round_factor(params.input_kernel.T, dtype)
    )
    return gating.params(*d_kernels, *d_others), d_inputs.reshape(inputs.shape)


def save_step(gating: Gating, factors: Arrays, after: Any) -> jax.Array:
    """Return the array that a step saves, [batch, n * hidden]: factors, c' if needed, and h'."""
    cell = [after.cell] if gating.has_peepholes else []
    return jnp.concatenate([*factors, *cell, after.hidden], axis=1)


def _forward_loop(
    gating: Gating, params: Any, added: jax.Array, carry: Any, marks: Marks, differentiable: bool
) -> tuple[Any, jax.Array]:
    kernel, peepholes = params.recurrent_kernel, get_peepholes(params, axis=0)
    # A frozen step leaves all bits of the hidden state; otherwise only matmuls read it.
    dtype = kernel.dtype if marks.frozen is None else added.dtype

    def step(state: Any, read: tuple[jax.Array, Marks]) -> tuple[Any, jax.Array]:
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


def _backward_loop(
    gating: Gating,
    kernel: jax.Array,
    saved: jax.Array,
    marks: Marks,
    d_last: Any,
    d_outputs: jax.Array,
) -> tuple[jax.Array, Any]:
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

    def make_row(d_sums: Arrays, d_carry: Any) -> jax.Array:
        """Return the rounded cotangents of the sums, and those of the carry by `_split`."""
        row = [d.astype(kernel.dtype) for d in d_sums]
        row += [part for d in jax.tree.leaves(d_carry) for part in _split(d, kernel.dtype)]
        filler = jnp.zeros((batch, depth - width - tail), kernel.dtype)
        return jnp.concatenate([*row, filler], axis=1)

    def read_carry(row: jax.Array) -> Any:
        halves = row[:, width : width + tail].astype(d_last.hidden.dtype)
        sums = halves.reshape(batch, len(leaves), parts, hidden).sum(axis=2)
        return jax.tree.unflatten(structure, [sums[:, i] for i in range(len(leaves))])

    def step(
        carry: tuple[jax.Array, jax.Array], read: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
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


def _split(x: jax.Array, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """Return arrays of `dtype` whose sum is x: in bfloat16 two, for a precision of 16 bits."""
    if dtype == x.dtype:
        return [x]
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(dtype), (x - high).astype(dtype)]
