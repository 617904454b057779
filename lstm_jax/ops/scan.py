"""Run a gated recurrence as a plain scan: the reference, which JAX can transform in every way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import Arrays, Gating


class Marks(NamedTuple):
    """Steps that do not simply read the carry, bool [time, batch] each; None is nowhere."""

    reset: jax.Array | None  # They read a carry of zeros.
    frozen: jax.Array | None  # They leave the carry as it is; their outputs are not used.


def clear(tree: Any, reset: jax.Array | None, axis: int = -1) -> Any:
    """Return arrays that are zero where `reset`, bool without the axis of features, is true."""
    if reset is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(reset, axis), 0, x), tree)


def keep(before: Any, after: Any, frozen: jax.Array | None, axis: int = -1) -> Any:
    """Return `before` where `frozen` is true, otherwise `after`."""
    if frozen is None:
        return after
    mask = jnp.expand_dims(frozen, axis)
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), before, after)


def add_hidden(carry: Any, term: jax.Array) -> Any:
    """Add a term to the hidden state of a carry, which is None if it is zero."""
    return carry._replace(hidden=term if carry.hidden is None else carry.hidden + term)


def run(
    gating: Gating, params: Any, inputs: jax.Array, carry: Any, marks: Marks, dtype: str
) -> tuple[Any, jax.Array]:
    """Run a layer: inputs [time, batch, features] → last carry, outputs [time, batch, hidden].

    The factors of matmuls are rounded to `dtype`.
    """
    from_inputs = matmul(inputs, params.input_kernel, dtype, params.bias)
    peepholes = get_peepholes(params, axis=0)

    def step(carry: Any, read: tuple[jax.Array, Marks]) -> tuple[Any, jax.Array]:
        from_inputs, mark = read
        before = clear(carry, mark.reset)
        from_hidden = matmul(before.hidden, params.recurrent_kernel, dtype)
        sums = add_sums(gating, params, from_inputs, from_hidden)
        _, after = gating.activate(sums, before, peepholes)
        after = keep(carry, after, mark.frozen)
        return after, after.hidden

    return lax.scan(step, carry, (from_inputs, marks))


def get_peepholes(params: Any, axis: int) -> jax.Array | None:
    """Return the peephole weights [3, hidden], if there are any, with an axis of size 1 more."""
    peepholes = getattr(params, "peepholes", None)
    return None if peepholes is None else jnp.expand_dims(peepholes, axis + 1)


def add_sums(gating: Gating, params: Any, from_inputs: jax.Array, from_hidden: jax.Array) -> Arrays:
    """Return the sums of a step, from x W + b and h U, [..., n * hidden] each."""
    of_inputs = jnp.split(from_inputs, len(gating.read_inputs), axis=-1)
    of_hidden = jnp.split(from_hidden, len(gating.read_hidden), axis=-1)
    sums: dict[int, jax.Array] = dict(zip(gating.read_inputs, of_inputs, strict=True))
    for index, term in zip(gating.read_hidden, of_hidden, strict=True):
        if index not in sums:  # The part of a GRU's candidate that the reset gate multiplies.
            sums[index] = params.recurrent_bias
        sums[index] = term + jnp.broadcast_to(sums[index], term.shape)
    return tuple(sums[index] for index in range(gating.num_sums))
