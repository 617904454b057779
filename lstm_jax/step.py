"""Run gated layers over one token at a time, for generation, from parameters prepared once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from lstm_jax.matmul import matmul, multiply_columns, round_factor
from lstm_jax.ops import choice, in_c
from lstm_jax.ops.gates import Gating


class StepArrays(NamedTuple):
    """The parameters of a model of gated layers, prepared for `apply_step`; kernels are rounded."""

    tokens: Float[Array, "vocabulary sums"]  # Each token's term in the first layer's sums.
    # [sums * hidden, inputs + hidden], or as the library packs it; for the first layer, no inputs.
    kernels: list[Array]
    biases: list[Float[Array, "1 sums"]]  # Of each layer but the first.
    peepholes: list[Float[Array, "3 hidden"] | None]  # Of each layer.
    head: Float[Array, "vocabulary features"]  # The dense layer's kernel.
    head_bias: Float[Array, " vocabulary"]


def prepare_step(
    gating: Gating,
    table: Float[Array, "vocabulary features"],
    layers: Sequence[Any],
    head: Float[Array, "hidden vocabulary"],
    head_bias: Float[Array, " vocabulary"],
    dtype: str,
) -> StepArrays:
    """Precompute what is the same at every step.

    `table` is the embedding, `layers` are the parameters of each layer, for `ops.run`, and `head`
    is the dense layer's kernel. `dtype` is that of the factors of matmuls.
    """
    parts = [gating.spread_kernels(layer) for layer in layers]
    biases = [gating.join_biases(layer) for layer in layers]
    (first, recurrent), *others = parts
    kernels = [recurrent, *map(jnp.concatenate, others)]
    terms = [matmul(table, first, dtype, biases[0]), *(bias[None] for bias in biases[1:])]
    packed = [_prepare_kernel(gating, kernel, dtype) for kernel in kernels]
    rounded = round_factor(head.T, dtype)
    peepholes = [getattr(layer, "peepholes", None) for layer in layers]
    return StepArrays(terms[0], packed, terms[1:], peepholes, rounded, head_bias)


def _prepare_kernel(gating: Gating, kernel: Array, dtype: str) -> Array:
    depth, width = kernel.shape
    fits = kernel.dtype == jnp.float32 and depth % in_c.NUMBERS_IN_WORD[dtype] == 0
    if fits and choice.runs_in_c("steps", dtype, width // gating.num_sums, gating=gating.name):
        return in_c.pack_gates(gating, kernel.astype(dtype))
    return round_factor(kernel.T, dtype)


def apply_step(
    gating: Gating,
    arrays: StepArrays,
    ids: Integer[Array, " batch"],
    carry: Sequence[Any],
    dtype: str,
    skip_connections: bool,
) -> tuple[Float[Array, "batch vocabulary"], tuple[Any, ...]]:
    """Run the model over one token of each text; return logits and the next carry."""
    added = [arrays.tokens[ids], *arrays.biases]
    states: list[Any] = []
    below: list[Array] = []  # The outputs of the layer below, if there is one.
    layers = zip(arrays.kernels, arrays.peepholes, carry, added, strict=True)
    for kernel, peepholes, before, term in layers:
        inputs = [*below, before.hidden]
        if kernel.ndim == 5:
            states.append(in_c.run_step(gating, kernel, inputs, before, term, peepholes))
        else:
            columns = round_factor(jnp.concatenate([x.T for x in inputs]), dtype)
            sums = jnp.split(multiply_columns(kernel, columns) + term.T, gating.num_sums)
            state = jax.tree.map(jnp.transpose, before)
            weights = None if peepholes is None else peepholes[:, :, None]
            _, after = gating.activate(tuple(sums), state, weights)
            states.append(jax.tree.map(jnp.transpose, after))
        hidden = states[-1].hidden
        below = [sum(below, hidden) if skip_connections else hidden]
    logits = matmul(arrays.head, below[0].T, dtype).T + arrays.head_bias[None]
    return logits, tuple(states)
