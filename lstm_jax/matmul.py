"""Matmuls in float32 or bfloat16, with float32 accumulation."""

import jax
import jax.numpy as jnp
from jax import lax


def matmul(a: jax.Array, b: jax.Array, dtype: str, bias: jax.Array | None = None) -> jax.Array:
    """Return a [..., m, k] @ b [..., k, n] + bias [n], multiplied in `dtype`, summed in float32.

    `dtype` is "bfloat16", or "float32" for the arrays' own dtype.
    """
    product = matmul_rounded(round_factor(a, dtype), round_factor(b, dtype))
    return product if bias is None else product + jnp.broadcast_to(bias, product.shape)


def matmul_rounded(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b for operands that `round_factor` has rounded; in bfloat16 without a JVP."""
    is_low = a.dtype == b.dtype == jnp.bfloat16
    return _matmul_bfloat16(a, b) if is_low else jnp.matmul(a, b)


def multiply_columns(kernel: jax.Array, columns: jax.Array) -> jax.Array:
    """Return kernel [m, n] @ columns [n, batch], as `matmul_rounded` does.

    Since JAX 0.12, XLA's CPU backend takes twice as long as before for a matmul with one column. An
    explicit sum of products is faster there.
    """
    is_slow = columns.shape[1] == 1 and jax.__version_info__ >= (0, 12)
    if is_slow and jax.default_backend() == "cpu" and kernel.dtype == jnp.float32:
        return (kernel * columns.T).sum(axis=1, keepdims=True)
    return matmul_rounded(kernel, columns)


@jax.custom_vjp
def _matmul_bfloat16(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _transpose(
    factors: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = factors
    # JAX would convert the operands to float32, as the cotangent is.
    low = cotangent.astype(jnp.bfloat16)
    (d_a,) = jax.linear_transpose(lambda a: jnp.matmul(a, b), a)(low)
    (d_b,) = jax.linear_transpose(lambda b: jnp.matmul(a, b), b)(low)
    return d_a, d_b


_matmul_bfloat16.defvjp(lambda a, b: (_matmul_bfloat16(a, b), (a, b)), _transpose)


def round_factor(x: jax.Array, dtype: str, native: bool = False) -> jax.Array:
    """Round a factor for `matmul_rounded`, only once if several matmuls share it.

    `native`: multiply in bfloat16 on XLA's CPU backend, too, which supports these matmuls.
    """
    if dtype == "float32":
        return x
    if jax.default_backend() == "cpu" and not native:
        # This backend lacks some bfloat16 matmuls and is slow at the others: round to the mantissa
        # of bfloat16 and multiply in float32, which is what other devices compute.
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)
