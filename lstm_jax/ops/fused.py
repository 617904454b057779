"""Run a gated recurrence in XLA on CPUs: the results of the scan, faster.

It is fast for these reasons:

- Reverse-mode differentiation of a scan accumulates the gradient of the whole recurrent kernel at
  every step. Here the backward loop computes gradients of the sums only, and one matmul for each
  gate, over time and batch, then computes the gradient of the kernels.
- Arrays are feature-major, [features, batch]: XLA's CPU matmuls are fastest as
  [4 * hidden, features] @ [features, batch].
- Inputs, a row of ones (for the bias) and the hidden state are stacked, so that one matmul a step
  computes all sums that read both.
- The backward loop writes the gradient of each sum into the memory of its gate. Page faults of
  newly allocated memory would take longer than all elementwise operations.

`benchmarks/layers.py` measures the speed.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lstm_jax.matmul import matmul_rounded, round_factor
from lstm_jax.ops.gates import Arrays, Gating
from lstm_jax.ops.processor import is_faster_in_bfloat16
from lstm_jax.ops.scan import Layer, Marks, add_hidden, clear, get_peepholes, keep

# What the forward loop saves: the factors of the matmuls of all steps, [features + 1 + hidden,
# time, batch], and the gates and carries after each step, [time, hidden, batch] each.
Saved = tuple[Array, Arrays, Any]


def forward(
    layer: Layer, differentiable: bool = True
) -> tuple[tuple[Any, Float[Array, "time batch hidden"]], Saved]:
    """Return the last carry and the outputs, and what the backward pass needs."""
    gating, params, inputs, carry, marks, dtype = layer
    low = _rounding(inputs, dtype)
    kernels = _stack_kernels(gating, params, low)
    peepholes = get_peepholes(params, axis=1)
    time, batch, features = inputs.shape
    size = carry.hidden.shape[1]
    depth = features + 1 + size
    one = jnp.ones_like(inputs[0, :, :1].T)
    # Not in bfloat16: the backend can't write a slice of such an array in place.
    columns = jnp.zeros((depth, time * batch), inputs.dtype)

    def step(
        state: tuple[Any, Array], read: tuple[Array, Array, Marks]
    ) -> tuple[tuple[Any, Array], tuple[Any, Arrays]]:
        (carry, columns), (t, x, mark) = state, read
        before = clear(carry, mark.reset, axis=0)
        stacked = jnp.concatenate([low(part) for part in (x, one, before.hidden)])
        # Written step by step, because XLA's CPU backend is slow at transposing them later.
        columns = lax.dynamic_update_slice(columns, stacked.astype(columns.dtype), (0, t * batch))
        sums = [
            part
            for kernel, rows in kernels
            for part in jnp.split(multiply_columns(kernel, stacked[rows]), len(kernel) // size)
        ]
        gates, after = gating.activate(tuple(sums), before, peepholes)
        after = keep(carry, after, mark.frozen, axis=0)
        # The scan stacks several arrays: to concatenate the gates would be a slow copy each step.
        return (after, columns), (after, gates)

    state = jax.tree.map(jnp.transpose, carry), columns
    read = jnp.arange(time), inputs.swapaxes(1, 2), marks
    (last, columns), (states, gates) = lax.scan(step, state, read)
    saved = columns.reshape(depth, time, batch), gates, states
    return (jax.tree.map(jnp.transpose, last), states.hidden.swapaxes(1, 2)), saved


def backward(
    layer: Layer, saved: Saved, d_last: Any, d_outputs: Float[Array, "time batch hidden"]
) -> tuple[Arrays, Any]:
    """Return the cotangents of the sums, [time, hidden, batch] each, and of the first carry.

    `d_last` and `d_outputs` are those of the last carry and of the outputs.
    """
    gating, params, _, carry, marks, dtype = layer
    _, gates, states = saved
    low = _rounding(d_outputs, dtype)
    recurrent_kernel = low(params.recurrent_kernel)
    peepholes = get_peepholes(params, axis=1)
    first, d_last = jax.tree.map(jnp.transpose, (carry, d_last))
    d_outputs = d_outputs.swapaxes(1, 2)
    time = len(d_outputs)

    def loop_step(k: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        gates, d_sums, d_after = state
        t = time - 1 - k
        mark = jax.tree.map(lambda x: _at(x, t), marks)
        # Write the gradients into the memory of the gates one step late, before the next gates are
        # read, so that XLA needs no copy. (The first write, at step T, is clamped to T - 1, where
        # its values came from.)
        gates = tuple(_put(x, d, t + 1) for x, d in zip(gates, d_sums, strict=True))
        earlier = jax.tree.map(lambda x: _at(x, jnp.maximum(t - 1, 0)), states)
        before = jax.tree.map(lambda x, y: jnp.where(t == 0, x, y), first, earlier)
        before = clear(before, mark.reset, axis=0)
        d_after = d_after._replace(hidden=d_after.hidden + _at(d_outputs, t))
        after = jax.tree.map(lambda x: _at(x, t), states)
        factors = gating.derive(tuple(_at(gate, t) for gate in gates), before, after, peepholes)
        d_sums, d_before = gating.pull_back(factors, d_after)
        d_sums = tuple(keep(jnp.zeros_like(d), d, mark.frozen, axis=0) for d in d_sums)
        stacked = jnp.concatenate([low(d_sums[i]) for i in gating.read_hidden])
        d_before = add_hidden(d_before, matmul_rounded(recurrent_kernel, stacked))
        d_before = keep(d_after, d_before, mark.frozen, axis=0)
        return gates, d_sums, clear(d_before, mark.reset, axis=0)

    state = gates, tuple(gate[-1] for gate in gates), d_last
    gates, d_sums, d_first = lax.fori_loop(0, time, loop_step, state)
    d_sums = tuple(_put(gate, d, 0) for gate, d in zip(gates, d_sums, strict=True))
    return d_sums, jax.tree.map(jnp.transpose, d_first)


def differentiate_params(
    layer: Layer, saved: Saved, d_sums: Arrays
) -> tuple[Any, Float[Array, "time batch features"]]:
    """Return the cotangents of the parameters and inputs, from those of the sums."""
    gating, params, inputs, carry, marks, dtype = layer
    columns, _, states = saved
    low = _rounding(inputs, dtype)
    features, size = inputs.shape[2], len(params.recurrent_kernel)
    factors = low(columns.reshape(len(columns), -1))
    # Copy the gradients to rows of time and batch: only matmuls without a transposed factor are
    # fast in bfloat16 on XLA's CPU backend.
    rows = [low(d).swapaxes(1, 2).reshape(-1, size) for d in d_sums]
    blocks = [
        matmul_rounded(factors[part], rows[i])
        for part, indices in _list_groups(gating, features)
        for i in indices
    ]
    d_params = {
        "input_kernel": [blocks[i][:features] for i in gating.read_inputs],
        "recurrent_kernel": [blocks[i][-size:] for i in gating.read_hidden],
    }
    d_kernels = {name: jnp.concatenate(parts, axis=1) for name, parts in d_params.items()}
    d_bias = [block[features if i in gating.read_inputs else 0] for i, block in enumerate(blocks)]
    d_others = list(gating.split_biases(jnp.concatenate(d_bias)))
    if gating.has_peepholes:
        cells = jnp.concatenate([carry.cell.T[None], states.cell[:-1]])
        cells = clear(cells, marks.reset, axis=1)
        d_i, d_f, _, d_o = d_sums
        pairs = (d_i, cells), (d_f, cells), (d_o, states.cell)
        d_others.append(jnp.stack([(d * c).sum(axis=(0, 2)) for d, c in pairs]))
    # XLA removes these matmuls if their result is unused, as for one-hot inputs.
    parts = jnp.split(low(params.input_kernel.T), len(gating.read_inputs))
    products = [matmul_rounded(rows[i], w) for i, w in zip(gating.read_inputs, parts, strict=True)]
    d_inputs = functools.reduce(jnp.add, products)
    return gating.params(*d_kernels.values(), *d_others), d_inputs.reshape(inputs.shape)


def _list_groups(gating: Gating, features: int) -> list[tuple[slice, list[int]]]:
    """Return the sums that read the same rows of the stacked inputs, one and hidden state."""

    def find_rows(index: int) -> tuple[int, int | None]:
        begin = 0 if index in gating.read_inputs else features
        return begin, None if index in gating.read_hidden else features + 1

    groups = itertools.groupby(range(gating.num_sums), find_rows)
    return [(slice(*rows), list(indices)) for rows, indices in groups]


def _stack_kernels(gating: Gating, params: Any, low: Callable[[Array], Array]) -> Any:
    """Return a kernel [sums * hidden, rows] for each group of sums, and the rows that it reads."""
    features, size = params.input_kernel.shape[0], len(params.recurrent_kernel)
    bias = gating.join_biases(params)
    kernels = []
    for rows, indices in _list_groups(gating, features):

        def take(kernel: Array, readers: Sequence[int], first: int = indices[0]) -> Array:
            """Return the columns of the group's sums, which stand side by side, transposed."""
            begin = readers.index(first) * size
            return kernel[..., begin : begin + len(indices) * size].T  # noqa: B023

        # Transpose here, not at every step, and each part separately: XLA's CPU backend is several
        # times slower when it concatenates and transposes in one copy.
        parts = [take(bias[None], range(gating.num_sums))]
        if rows.start == 0:
            parts.insert(0, take(params.input_kernel, gating.read_inputs))
        if rows.stop is None:
            parts.append(take(params.recurrent_kernel, gating.read_hidden))
        kernels.append((jnp.concatenate([low(part) for part in parts], axis=1), rows))
    return kernels


def _rounding(inputs: Array, dtype: str) -> Callable[[Array], Array]:
    """Return the function that rounds factors in the recurrence over inputs [time, batch, ...].

    They are multiplied in bfloat16 where that is faster. XLA's CPU backend has no bfloat16 matmuls
    with a transposed first factor. There are none here, unless the loop has a single step, which
    XLA fuses with the code around it, or the batch has a single text, for which XLA removes the
    transposing copies.
    """
    time, batch, _ = inputs.shape
    native = is_faster_in_bfloat16() and time > 1 and batch > 1
    return lambda x: round_factor(x, dtype, native)


def multiply_columns(kernel: Array, columns: Array) -> Array:
    """Return kernel [m, n] @ columns [n, batch].

    Since JAX 0.12, XLA's CPU backend takes twice as long as before for a matmul with one column. An
    explicit sum of products is faster there.
    """
    is_slow = columns.shape[1] == 1 and jax.__version_info__ >= (0, 12)
    if is_slow and jax.default_backend() == "cpu" and kernel.dtype == jnp.float32:
        return (kernel * columns.T).sum(axis=1, keepdims=True)
    return matmul_rounded(kernel, columns)


def _at(x: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(x, t, keepdims=False)


def _put(x: Array, value: Array, t: Array | int) -> Array:
    return lax.dynamic_update_index_in_dim(x, value, t, axis=0)
