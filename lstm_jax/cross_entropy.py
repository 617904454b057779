"""The cross-entropy of a dense layer's predictions, with a custom VJP for large vocabularies.

The logits of a batch are the largest array of a training step: with 10,000 tokens they can have as
many numbers as all parameters. Here their derivatives are computed together with the loss, in the
dtype of the matmuls, and no other array of their size is kept. The library in C does not store the
logits either: it computes those of a few rows at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from lstm_jax.matmul import round_factor
from lstm_jax.ops import choice, in_c
from lstm_jax.ops.gates import align


class _Options(NamedTuple):
    is_transposed: bool
    dtype: str
    uses_c: bool


def compute_cross_entropy(
    inputs: Float[Array, "n features"],
    kernel: Float[Array, "features vocabulary"] | Float[Array, "vocabulary features"],
    bias: Float[Array, " vocabulary"],
    targets: Integer[Array, " n"],
    is_transposed: bool = False,
    dtype: str = "float32",
) -> Float[Array, " n"]:
    """Return the cross-entropy of softmax(inputs @ kernel + bias) and each target, in nats.

    `kernel` is [features, vocabulary], or [vocabulary, features] if `is_transposed`. Operands of
    matmuls are rounded to `dtype`. The loss of a target outside of the vocabulary is NaN. In C, the
    gradient can't be differentiated again.
    """
    uses_c = len(inputs) and inputs.dtype == jnp.float32 and choice.runs_in_c("losses", dtype)
    options = _Options(is_transposed, dtype, bool(uses_c))
    return _compute(*align((inputs, kernel, bias, targets)), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _compute(inputs: Array, kernel: Array, bias: Array, targets: Array, options: _Options) -> Array:
    return _forward(inputs, kernel, bias, targets, options, differentiable=False)[0]


def _forward(
    inputs: Array,
    kernel: Array,
    bias: Array,
    targets: Array,
    options: _Options,
    differentiable: bool = True,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Return the losses; and inputs, the rounded kernel, and each loss's derivatives by logits."""
    low, rounded = _round(inputs, options), _round(kernel, options)
    if options.uses_c:
        losses, d_logits = in_c.compute_cross_entropy(
            low, rounded, bias, targets, options.is_transposed, differentiable
        )
    else:
        logits = _multiply(low, rounded, False, options.is_transposed, options) + bias[None]
        log_sums = jax.nn.logsumexp(logits, axis=1)
        # JAX counts negative indices from the end.
        columns = jnp.where(targets < 0, len(bias), targets.astype("int32"))
        losses = log_sums - jnp.take_along_axis(logits, columns[:, None], axis=1)[:, 0]
        is_target = targets[:, None] == jnp.arange(len(bias))[None]
        d_logits = _round(jnp.exp(logits - log_sums[:, None]) - is_target, options)
    return losses, (inputs, rounded, d_logits)


def _backward(
    options: _Options, residuals: tuple[Array, Array, Array], d_losses: Array
) -> tuple[Array, Array, Array, None]:
    inputs, kernel, d_logits = residuals
    d_inputs = _multiply(d_logits, kernel, False, not options.is_transposed, options)
    # The cotangents of the losses scale the inputs: the derivatives need no second copy.
    scaled = _round(inputs * d_losses[:, None], options)
    factors = (d_logits, scaled) if options.is_transposed else (scaled, d_logits)
    d_kernel = _multiply(*factors, True, False, options)
    d_bias = d_losses @ d_logits.astype(d_losses.dtype)
    return d_inputs * d_losses[:, None], d_kernel, d_bias, None


_compute.defvjp(_forward, _backward)


def _round(x: Array, options: _Options) -> Array:
    return round_factor(x, options.dtype, native=options.uses_c)


def _multiply(a: Array, b: Array, transpose_a: bool, transpose_b: bool, options: _Options) -> Array:
    """Return a @ b for rounded matrices, each of which can be transposed first."""
    if options.uses_c:
        return in_c.matmul(a, b, transpose_a, transpose_b)
    axes = ((int(not transpose_a),), (int(transpose_b),)), ((), ())
    dtype = jnp.promote_types(a.dtype, "float32")
    return lax.dot_general(a, b, axes, preferred_element_type=dtype)
