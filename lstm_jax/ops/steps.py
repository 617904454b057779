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
from lstm_jax.ops.gates import GATINGS, clear, expand
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
        if self.runs_in_c:
            after = in_c.run_step(gating, self.kernel, rows, terms, before, params.peepholes)
        else:  # Feature-major.
            sums = multiply_columns(self.kernel, round_factor(rows.T, self.dtype)) + terms.T
            peepholes = None if params.peepholes is None else params.peepholes[:, :, None]
            state = jax.tree.map(jnp.transpose, before)
            after, _ = gating.activate(tuple(jnp.split(sums, gating.num_sums)), state, peepholes)
            after = jax.tree.map(jnp.transpose, after)
        after = jax.tree.map(lambda x, y: x.astype(y.dtype), after, first)
        return after, after.hidden


def prepare(
    params: Any, *, is_one_hot: bool = False, dtype: DTypeLike | None = None
) -> PreparedLayer:
    """Compute what is the same at all steps of the layer with these parameters.

    `layer.step(inputs, carry)` then is `ops.step(params, inputs, carry)`, but faster, and in C not
    differentiable. With `is_one_hot`, inputs are integers, each the place of the 1. `dtype` is as
    in `lstm`, by default that of the recurrent kernel.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    gating = get_gating(params)
    (params,) = check(params=(params, gating.params))
    low, wide = choose_dtypes(dtype, params.recurrent_kernel, params)
    gated, size = expand(params), len(params.recurrent_kernel)
    kernel, terms = gating.spread(gated.recurrent_kernel, gating.of_hidden), gated.bias[None]
    input_kernel = gating.spread(gated.input_kernel, gating.of_inputs)
    if is_one_hot:
        terms = input_kernel + terms
    else:
        kernel = jnp.concatenate([input_kernel, kernel])
    kernel, terms = kernel.astype(wide), terms.astype(wide)
    runs_in_c = wide == jnp.float32 and choice.runs_in_c("steps", low, size, gating.name)
    if runs_in_c:
        kernel = in_c.pack_gates(gating, kernel.astype(low))
    else:
        kernel = round_factor(kernel.T, low)
    return PreparedLayer(params, kernel, terms, is_one_hot, low, runs_in_c)
