"""Run gated layers one step at a time, in XLA or with the library in C, for generating text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer, Shaped

from lstm_jax.matmul import multiply_columns, round_factor
from lstm_jax.ops import choice, in_c
from lstm_jax.ops.api import get_gating
from lstm_jax.ops.gates import GATINGS, GatedParams, Gating, clear, expand
from lstm_jax.ops.sequences import check, choose_dtypes

_static: Any = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedLayer:
    """A gated layer that `prepare` has prepared for single steps."""

    params: Any  # `LSTMParams`, or those of another layer.
    kernel: Array  # [sums, inputs + hidden], rounded; or as the library packs it.
    terms: Array  # [1, sums], the bias; or with one-hot inputs [features, sums], for each input.
    is_one_hot: bool = _static()
    dtype: str = _static()
    runs_in_c: bool = _static()

    def step(
        self,
        inputs: Float[ArrayLike, "batch features"] | Integer[ArrayLike, " batch"],
        carry: Any,
        reset: Shaped[ArrayLike, " batch"] | None = None,
    ) -> tuple[Any, Float[Array, "batch hidden"]]:
        """Run one step; arguments, results and errors are those of `ops.step`.

        If inputs are one-hot, they are integers [batch] below the number of features.
        """
        gating, wide = GATINGS[type(self.params)], self.terms.dtype
        kind: Any = Integer[Array, " batch"] if self.is_one_hot else Float[Array, "batch features"]
        x, params, first, mask = check(
            inputs=(inputs, kind),
            params=(self.params, gating.params),
            carry=(carry, gating.carry),
            reset=(reset, Shaped[Array, " batch"]),
        )
        mask, params = None if mask is None else mask.astype(bool), expand(params)
        before = clear(jax.tree.map(lambda x: x.astype(wide), first), mask)
        rows, terms = before.hidden, self.terms
        if self.is_one_hot:
            terms = terms[x]
        else:
            rows = jnp.concatenate([x, rows], axis=1)
        arrays = rows, terms, before, params.peepholes
        if self.runs_in_c:
            kernel = _join_kernels(gating, params, self.is_one_hot)
            after = _run_in_c(gating, self.dtype, self.kernel, kernel, *arrays)
        else:
            after = _run_in_xla(gating, self.dtype, self.kernel, *arrays)
        after = jax.tree.map(lambda x, y: x.astype(y.dtype), after, first)
        return after, after.hidden


def prepare(
    params: Any, *, is_one_hot: bool = False, dtype: DTypeLike | None = None
) -> PreparedLayer:
    """Compute what is the same at all steps of the layer with these parameters.

    `layer.step(inputs, carry)` then is `ops.step(params, inputs, carry)`, but faster. With
    `is_one_hot`, inputs are integers, each the place of the 1. `dtype` is as in `lstm`, by default
    that of the recurrent kernel.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    gating = get_gating(params)
    (params,) = check(params=(params, gating.params))
    low, wide = choose_dtypes(dtype, params.recurrent_kernel, params)
    gated, size = expand(params), len(params.recurrent_kernel)
    kernel, terms = _join_kernels(gating, gated, is_one_hot).astype(wide), gated.bias[None]
    if is_one_hot:
        terms = gating.spread(gated.input_kernel, gating.of_inputs) + terms
    uses_c = wide == jnp.float32 and choice.runs_in_c("steps", low, size, gating.name)
    if uses_c:  # `_run_in_c` is differentiated by the parameters.
        kernel = in_c.pack_gates(gating, jax.lax.stop_gradient(kernel).astype(low))
    else:
        kernel = round_factor(kernel.T, low)
    return PreparedLayer(params, kernel, terms.astype(wide), is_one_hot, low, uses_c)


def _join_kernels(gating: Gating, params: GatedParams, is_one_hot: bool) -> Array:
    """Return what multiplies the inputs, unless they are one-hot, and the hidden state."""
    kernel = gating.spread(params.recurrent_kernel, gating.of_hidden)
    if is_one_hot:
        return kernel
    return jnp.concatenate([gating.spread(params.input_kernel, gating.of_inputs), kernel])


def _run_in_xla(gating: Gating, dtype: str, kernel: Array, *arrays: Any) -> Any:
    """Return the next carry, computed feature-major.

    `arrays` are what the kernel multiplies [batch, depth], terms [batch or 1, sums], the carry, and
    peepholes or None.
    """
    rows, terms, carry, peepholes = arrays
    sums = multiply_columns(kernel, round_factor(rows.T, dtype)) + terms.T
    weights = None if peepholes is None else peepholes[:, :, None]
    state = jax.tree.map(jnp.transpose, carry)
    after, _ = gating.activate(tuple(jnp.split(sums, gating.num_sums)), state, weights)
    return jax.tree.map(jnp.transpose, after)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _run_in_c(gating: Gating, dtype: str, packed: Array, kernel: Array, *others: Any) -> Any:
    return in_c.run_step(gating, packed, *others)


@_run_in_c.defjvp
def _differentiate(gating: Gating, dtype: str, primals: Any, tangents: Any) -> Any:
    """Differentiate the same step in XLA."""

    def run(kernel: Array, *others: Any) -> Any:
        return _run_in_xla(gating, dtype, round_factor(kernel.T, dtype), *others)

    return jax.jvp(run, primals[1:], tangents[1:])
