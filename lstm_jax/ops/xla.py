"""Run a gated recurrence in XLA: by a scan, the reference, or faster, with the same results.

- Reverse-mode differentiation of a scan adds to the gradient of the whole recurrent kernel at every
  step. Here the backward loop computes gradients of the sums only, and one matmul for each kernel,
  over time and batch, computes its gradient after the loop.
- A step saves its derivatives (`gates.py`), so that a backward step has little to compute.
- On CPUs, the loops have feature-major arrays, [features, batch]: XLA's matmuls are fastest there
  as [n, features] @ [features, batch].
- On GPUs, the time of a small layer depends mostly on how many GPU kernels each step launches: here
  at most five, the loop counter included (`benchmarks/accelerators.py` counts them). A step reads
  and writes one array each, and none of the kernels only pads or converts an array.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lstm_jax.matmul import matmul, matmul_rounded, multiply_columns, round_factor
from lstm_jax.ops import vjp
from lstm_jax.ops.gates import Arrays, GatedParams, Layer, Marks, Outputs, Sums, align, clear
from lstm_jax.ops.processor import is_faster_in_bfloat16

Residuals = Array | list[Array]  # By `forward`, of all steps or of one.
_DEPTH = 256  # XLA pads the depth of some matmuls on GPUs to a multiple of it.


def scan(layer: Layer) -> tuple[Any, Outputs]:
    """Run the reference, which JAX can transform in any way; return the last carry and outputs."""
    gating, dtype, _, *arrays = layer
    params, inputs, carry, marks = align(arrays)
    bias = gating.take(params.bias, gating.of_inputs)
    by_inputs = matmul(inputs, params.input_kernel, dtype, bias)
    peepholes = jax.tree.map(lambda x: x[:, None], params.peepholes)  # There may be none.

    def step(carry: Any, xs: tuple[Array, Marks]) -> tuple[Any, Array]:
        by_inputs, mark = xs
        state = clear(carry, mark.reset)
        by_hidden = matmul(state.hidden, params.recurrent_kernel, dtype)
        sums = gating.add_sums(params.bias, by_inputs, by_hidden, 1)
        state, _ = gating.activate(sums, state, peepholes)
        state = _keep(carry, state, mark.frozen)
        return state, state.hidden

    return lax.scan(step, carry, (by_inputs, marks))


def forward(layer: Layer, differentiable: bool = True) -> tuple[tuple[Any, Outputs], Residuals]:
    """Return the last carry and the outputs, and what each step saves for the backward pass.

    That is the derivatives if `differentiable`, the cell state if gates see it, and the hidden
    state: on CPUs a list of arrays [time, hidden, batch], otherwise one, [time, batch, n * hidden].
    """
    gating, dtype, axis, params, inputs, carry, marks = layer
    rounded = [_round(layer, x) for x in (*params[:2], inputs)]
    input_kernel, kernel, terms = _swap_layout(layer, rounded)
    bias = gating.take(params.bias, gating.of_inputs)
    if axis:
        terms = matmul_rounded(terms, input_kernel) + bias[None, None]
    else:  # The loop multiplies, which is faster on CPUs. XLA would transpose in each step.
        kernel, input_kernel = lax.optimization_barrier((kernel, input_kernel))
    peepholes = jax.tree.map(lambda x: jnp.expand_dims(x, 2 - axis), params.peepholes)

    def round_hidden(state: Any) -> Array | None:
        """Return the factor of the next matmul, if it is not the hidden state itself."""
        return None if dtype == "float32" else _round(layer, state.hidden)

    def step(carry: tuple[Any, Array | None], xs: tuple[Array, Marks]) -> tuple[Any, Residuals]:
        (state, rounded), (terms, mark) = carry, xs
        if not axis:
            terms = multiply_columns(input_kernel, terms) + bias[:, None]
        factor = state.hidden if rounded is None else rounded
        product = matmul_rounded(factor, kernel) if axis else multiply_columns(kernel, factor)
        sums = gating.add_sums(params.bias, terms, clear(product, mark.reset, axis), axis)
        new, factors = gating.activate(sums, clear(state, mark.reset, axis), peepholes)
        new = _keep(state, new, mark.frozen, axis)
        cell = [] if peepholes is None else [new.cell]
        residuals = [*(factors if differentiable else ()), *cell, new.hidden]
        # XLA's CPU backend would compute all of them twice to concatenate them.
        return (new, round_hidden(new)), jnp.concatenate(residuals, axis) if axis else residuals

    first = _swap_layout(layer, carry)
    (last, _), residuals = lax.scan(step, (first, round_hidden(first)), (terms, marks))
    last, outputs = _swap_layout(layer, (last, _split(layer, residuals)[1][-1]))
    return (last._replace(hidden=outputs[-1]), outputs), residuals


def backward(
    layer: Layer, residuals: Residuals, d_last: Any, d_outputs: Outputs
) -> tuple[Sums, Any]:
    """Return the cotangents of the sums, [time, batch, sums * hidden], and of the first carry.

    `d_last` and `d_outputs` are those of the last carry and of the outputs.
    """
    if layer.axis:
        return _run_back_in_rows(layer, residuals, d_last, d_outputs)
    kernel = _round(layer, layer.params.recurrent_kernel)
    d_last, d_outputs = _swap_layout(layer, (d_last, d_outputs))

    def step(d_after: Any, xs: tuple[Any, Marks, Array]) -> tuple[Any, Array]:
        residuals, mark, d_output = xs
        d_after = _add_hidden(d_after, d_output)
        d_sums, d_before = _pull_back(layer, residuals, mark, d_after)
        row = jnp.concatenate(d_sums)  # Not in bfloat16, which XLA's CPU backend stores slowly.
        product = multiply_columns(kernel, _round(layer, row[: kernel.shape[1]]))
        product = clear(product.astype(row.dtype), mark.reset, layer.axis)
        return _add_hidden(d_before, product), row

    d_first, rows = lax.scan(step, d_last, (residuals, layer.marks, d_outputs), reverse=True)
    rows, d_first = _swap_layout(layer, (rows, d_first))
    return rows, d_first


def _pull_back(layer: Layer, residuals: Residuals, mark: Marks, d_after: Any) -> tuple[Arrays, Any]:
    """Return the cotangents of a step's sums, and of its carry without the part through h U."""
    factors, _ = _split(layer, residuals)
    d_sums, d_before = layer.gating.pull_back(tuple(factors), d_after)
    if mark.frozen is not None:
        d_before = _add_hidden(d_before, jnp.zeros_like(d_after.hidden))
    d_before = _keep(d_after, d_before, mark.frozen, layer.axis)
    return clear(d_sums, mark.frozen, layer.axis), clear(d_before, mark.reset, layer.axis)


def _run_back_in_rows(
    layer: Layer, residuals: Residuals, d_last: Any, d_outputs: Outputs
) -> tuple[Sums, Any]:
    """Run backwards on GPUs and TPUs, whose steps make one array each."""
    gating, marks = layer.gating, layer.marks
    kernel = _round(layer, layer.params.recurrent_kernel)
    steps, batch, hidden = d_outputs.shape
    width, zeros = gating.num_sums * hidden, jnp.zeros_like(d_last.hidden)
    # Which parts of the carry's cotangent do not come from the matmul of a step.
    keeps_hidden = marks.frozen is not None or gating.keeps_hidden
    d_direct = d_last._replace(hidden=zeros if keeps_hidden else None)
    leaves, structure = jax.tree.flatten(d_direct)
    parts = len(split_number(zeros, kernel.dtype))
    tail = len(leaves) * parts * hidden
    # The matmul of a step reads a whole row [batch, depth]; zeros skip what is not added to h U.
    depth = -(-(width + tail) // _DEPTH) * _DEPTH
    wide_kernel = jnp.pad(kernel.T, ((0, depth - kernel.shape[1]), (0, 0)))

    def make_row(d_sums: Arrays, d_direct: Any) -> Array:
        """Return the rounded cotangents of the sums, and those of the carry by `split_number`."""
        row = [d.astype(kernel.dtype) for d in d_sums]
        row += [part for d in jax.tree.leaves(d_direct) for part in split_number(d, kernel.dtype)]
        filler = jnp.zeros((batch, depth - width - tail), kernel.dtype)
        return jnp.concatenate([*row, filler], axis=1)

    def read_direct(row: Array) -> Any:
        halves = row[:, width : width + tail].astype(zeros.dtype)
        sums = halves.reshape(batch, len(leaves), parts, hidden).sum(axis=2)
        return jax.tree.unflatten(structure, [sums[:, i] for i in range(len(leaves))])

    def step(carry: tuple[Array, Array], xs: tuple[Any, ...]) -> tuple[tuple[Array, Array], None]:
        rows, product = carry
        t, residuals, mark, d_output = xs
        # Not from the scan's carry: that would launch one more GPU kernel.
        d_direct = read_direct(lax.dynamic_index_in_dim(rows, t + 1, keepdims=False))
        d_after = _add_hidden(d_direct, product + d_output)
        row = make_row(*_pull_back(layer, residuals, mark, d_after))
        row = lax.optimization_barrier(row)  # So that one GPU kernel makes it.
        rows = lax.dynamic_update_index_in_dim(rows, row, t, 0)
        product = matmul_rounded(row, wide_kernel).astype(zeros.dtype)
        return (rows, clear(product, mark.reset)), None

    last = make_row((zeros,) * gating.num_sums, d_direct)
    rows = jnp.zeros((steps + 1, batch, depth), kernel.dtype).at[-1].set(last)
    xs = jnp.arange(steps), residuals, marks, d_outputs
    (rows, product), _ = lax.scan(step, (rows, d_last.hidden), xs, reverse=True)
    return rows[:-1, :, :width], _add_hidden(read_direct(rows[0]), product)


def differentiate_params(
    layer: Layer, residuals: Residuals, d_sums: Sums
) -> tuple[GatedParams, Float[Array, "time batch features"]]:
    """Return the cotangents of the parameters and inputs, from those of the sums."""
    gating, _, axis, params, inputs, carry, marks = layer
    _, states = _split(layer, residuals)
    first = _swap_layout(layer, carry.hidden)[None]
    previous = clear(jnp.concatenate([first, states[-1][:-1]]), marks.reset, axis + 1)
    rows = _round(layer, d_sums.reshape(-1, d_sums.shape[2]))
    by_inputs, by_hidden = (gating.take(rows, x) for x in (gating.of_inputs, gating.of_hidden))
    # Features first, before they are rounded: otherwise XLA's CPU backend multiplies in float32.
    columns = [
        _round(layer, jnp.moveaxis(x, axis + 1, 0).reshape(x.shape[axis + 1], len(rows)))
        for x in (_swap_layout(layer, inputs), previous)
    ]
    d_kernels = [*map(matmul_rounded, columns, (by_inputs, by_hidden))]
    d_bias = d_sums.sum(axis=(0, 1), dtype=previous.dtype)
    d_peepholes = layer.differentiate_peepholes(d_sums, _swap_layout(layer, states[0]))
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = matmul_rounded(by_inputs, _round(layer, params.input_kernel.T))
    d_params = GatedParams(d_kernels[0], d_kernels[1], d_bias, d_peepholes)
    return d_params, d_inputs.reshape(inputs.shape)


def _keep(old: Any, new: Any, frozen: Bool[Array, "..."] | None, axis: int = -1) -> Any:
    """Return `old` where `frozen` is true, otherwise `new`."""
    if frozen is None:
        return new
    mask = jnp.expand_dims(frozen, axis)
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), old, new)


def _add_hidden(carry: Any, term: Float[Array, "..."]) -> Any:
    """Add a term to the hidden state of a carry, which is None if it is zero."""
    return carry._replace(hidden=term if carry.hidden is None else carry.hidden + term)


def _swap_layout(layer: Layer, tree: Any) -> Any:
    """Return arrays [..., batch, n] as loops have them, or the reverse."""
    return tree if layer.axis else jax.tree.map(lambda x: x.swapaxes(-1, -2), tree)


def _split(layer: Layer, residuals: Residuals) -> tuple[list[Array], list[Array]]:
    """Return the derivatives and the states, c if gates see it and h, of all steps or of one."""
    if not isinstance(residuals, list):
        number = residuals.shape[-1] // len(layer.params.recurrent_kernel)
        residuals = jnp.split(residuals, number, axis=-1)
    states = 1 if layer.params.peepholes is None else 2
    return residuals[:-states], residuals[-states:]


def _round(layer: Layer, x: Array) -> Array:
    """Round a factor of a matmul.

    On CPUs, multiply in bfloat16 where that is faster. XLA's CPU backend has no bfloat16 matmuls
    with a transposed first factor. There are none here, unless the loop has a single step, which
    XLA fuses with the code around it, or the batch has a single text, for which XLA removes the
    transposing copies.
    """
    if layer.dtype == "float32":  # Before sizes are compared: `jax.export` has symbolic ones.
        return x
    time, batch, _ = layer.inputs.shape
    native = not layer.axis and is_faster_in_bfloat16() and time > 1 and batch > 1
    return round_factor(x, layer.dtype, native)


def split_number(x: Array, dtype: DTypeLike) -> list[Array]:
    """Return arrays of `dtype` whose sum is x: in bfloat16 two, for a precision of 16 bits."""
    if dtype == x.dtype:
        return [x]
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(dtype), (x - high).astype(dtype)]


# Runs a layer as `scan` does, faster.
run = functools.partial(vjp.run, vjp.Implementation(forward, backward, differentiate_params))
