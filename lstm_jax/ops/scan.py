"""Run a gated recurrence as a plain scan: the reference, which JAX can transform in every way.

It also has what all implementations share.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import Arrays, Gating


class Marks(NamedTuple):
    """Steps that do not simply read the carry; None is nowhere."""

    reset: Bool[Array, "time batch"] | None  # They read a carry of zeros.
    frozen: Bool[Array, "time batch"] | None  # They leave the carry as it is; outputs aren't used.


class Layer(NamedTuple):
    """A gated layer, and all that it reads. Its arrays have one floating-point dtype."""

    gating: Gating
    params: Any
    inputs: Float[Array, "time batch features"]
    carry: Any  # Before the first step.
    marks: Marks
    dtype: str  # What factors of matmuls are rounded to, "float32" or "bfloat16".


def run(layer: Layer) -> tuple[Any, Float[Array, "time batch hidden"]]:
    """Return the last carry and the outputs."""
    gating, params, inputs, carry, marks, dtype = layer
    from_inputs = matmul(inputs, params.input_kernel, dtype, params.bias)
    peepholes = get_peepholes(params, axis=0)

    def step(carry: Any, read: tuple[Array, Marks]) -> tuple[Any, Array]:
        from_inputs, mark = read
        before = clear(carry, mark.reset)
        from_hidden = matmul(before.hidden, params.recurrent_kernel, dtype)
        sums = add_sums(gating, params, from_inputs, from_hidden)
        _, after = gating.activate(sums, before, peepholes)
        after = keep(carry, after, mark.frozen)
        return after, after.hidden

    return lax.scan(step, carry, (from_inputs, marks))


def clear(tree: Any, reset: Bool[Array, "..."] | None, axis: int = -1) -> Any:
    """Return arrays that are zero where `reset`, bool without the axis of features, is true."""
    if reset is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(reset, axis), 0, x), tree)


def keep(before: Any, after: Any, frozen: Bool[Array, "..."] | None, axis: int = -1) -> Any:
    """Return `before` where `frozen` is true, otherwise `after`."""
    if frozen is None:
        return after
    mask = jnp.expand_dims(frozen, axis)
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), before, after)


def add_hidden(carry: Any, term: Float[Array, "..."]) -> Any:
    """Add a term to the hidden state of a carry, which is None if it is zero."""
    return carry._replace(hidden=term if carry.hidden is None else carry.hidden + term)


def get_peepholes(params: Any, axis: int) -> Float[Array, "3 ..."] | None:
    """Return the peephole weights [3, hidden], if there are any, with an axis of size 1 more."""
    peepholes = getattr(params, "peepholes", None)
    return None if peepholes is None else jnp.expand_dims(peepholes, axis + 1)


def add_sums(
    gating: Gating, params: Any, from_inputs: Float[Array, "..."], from_hidden: Float[Array, "..."]
) -> Arrays:
    """Return the sums of a step, from x W + b and h U, [..., n * hidden] each."""
    of_inputs = jnp.split(from_inputs, len(gating.read_inputs), axis=-1)
    of_hidden = jnp.split(from_hidden, len(gating.read_hidden), axis=-1)
    sums: dict[int, Array] = dict(zip(gating.read_inputs, of_inputs, strict=True))
    for index, term in zip(gating.read_hidden, of_hidden, strict=True):
        if index not in sums:  # The part of a GRU's candidate that the reset gate multiplies.
            sums[index] = params.recurrent_bias
        sums[index] = term + jnp.broadcast_to(sums[index], term.shape)
    return tuple(sums[index] for index in range(gating.num_sums))


def select_sums(
    x: Float[Array, "n columns"], indices: Sequence[int], hidden: int
) -> Float[Array, "n selected"]:
    """Return the columns of some sums, of an array [n, sums * hidden]."""
    blocks = jnp.split(x, x.shape[1] // hidden, axis=1)
    is_all = len(indices) == len(blocks)
    return x if is_all else jnp.concatenate([blocks[i] for i in indices], axis=1)


def differentiate_peepholes(
    layer: Layer, d_sums: Float[Array, "time batch sums"], cells: Float[Array, "time batch hidden"]
) -> Float[Array, "3 hidden"]:
    """Return the cotangent of peephole weights, from those of the sums and all cell states."""
    before = clear(jnp.concatenate([layer.carry.cell[None], cells[:-1]]), layer.marks.reset)
    d_i, d_f, _, d_o = jnp.split(d_sums, 4, axis=2)
    terms = d_i * before, d_f * before, d_o * cells
    return jnp.stack([term.sum(axis=(0, 1)) for term in terms])
