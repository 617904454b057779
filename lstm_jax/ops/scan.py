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
    peepholes = get_peepholes(params)

    def step(carry: Any, read: tuple[Array, Marks]) -> tuple[Any, Array]:
        from_inputs, mark = read
        before = clear(carry, mark.reset)
        from_hidden = matmul(before.hidden, params.recurrent_kernel, dtype)
        sums = add_sums(gating, params, from_inputs, from_hidden)
        _, after = gating.activate(sums, before, peepholes)
        after = keep(carry, after, mark.frozen)
        return after, after.hidden

    return lax.scan(step, carry, (from_inputs, marks))


# `axis` is that of the features in an array of a step: 1, or 0 if the batch is last.


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


def get_peepholes(params: Any, axis: int = 1) -> Float[Array, "3 ..."] | None:
    """Return the peephole weights [3, hidden], if there are any, with an axis for the batch."""
    peepholes = getattr(params, "peepholes", None)
    return None if peepholes is None else jnp.expand_dims(peepholes, 2 - axis)


def add_sums(
    gating: Gating,
    params: Any,
    from_inputs: Float[Array, "..."],
    from_hidden: Float[Array, "..."],
    axis: int = 1,
) -> Arrays:
    """Return the sums of a step, from x W + b and h U."""
    of_inputs, of_hidden = (
        jnp.split(x, gating.num_gates, axis) for x in (from_inputs, from_hidden)
    )
    if gating.num_sums == gating.num_gates:
        return tuple(h + x for x, h in zip(of_inputs, of_hidden, strict=True))
    (xr, xz, xn), (hr, hz, hn) = of_inputs, of_hidden
    return hr + xr, hz + xz, hn + jnp.expand_dims(params.recurrent_bias, 1 - axis), xn


def make_gradients(
    layer: Layer,
    d_kernels: Sequence[Array],
    d_bias: Float[Array, " sums"],
    d_sums: Float[Array, "time batch sums"],
    cells: Float[Array, "time batch hidden"],
) -> Any:
    """Return the cotangents of the parameters, whose kernels are the input and recurrent kernel.

    Only gates that see the cell states need `cells`.
    """
    gating, carry = layer.gating, layer.carry
    d_params = [*d_kernels, *gating.split_biases(d_bias)]
    if gating.has_peepholes:
        before = clear(jnp.concatenate([carry.cell[None], cells[:-1]]), layer.marks.reset)
        d_i, d_f, _, d_o = jnp.split(d_sums.astype(cells.dtype), 4, axis=2)
        terms = d_i * before, d_f * before, d_o * cells
        d_params.append(jnp.stack([term.sum(axis=(0, 1)) for term in terms]))
    return gating.params(*d_params)
