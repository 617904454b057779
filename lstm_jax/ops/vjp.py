"""Run a gated recurrence by a faster implementation, with a custom VJP.

The backward pass is a loop over time that computes the cotangents of the sums, and then one matmul
for each kernel. `vmap` over inputs and carries makes one larger batch of the loops.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from lstm_jax.ops.gates import Layer, Outputs, align


class Implementation(NamedTuple):
    """A way to run a gated recurrence; `xla` shows the arguments and results of its functions.

    Arrays that `forward` saves are [time, batch, n], or [time, n, batch] if `Layer.axis` is 0.
    """

    forward: Callable[..., tuple[tuple[Any, Array], Any]]
    backward: Callable[..., tuple[Array, Any]]
    differentiate_params: Callable[..., tuple[Any, Array]]


def run(implementation: Implementation, layer: Layer) -> tuple[Any, Outputs]:
    """Return the last carry and the outputs."""
    return _run((implementation, *layer[:3]), *align(layer[3:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: tuple[Any, ...], *arrays: Any) -> Any:
    return _run_forward(static, *arrays, differentiable=False)[0]


def _run_forward(
    static: tuple[Any, ...], *arrays: Any, differentiable: bool = True
) -> tuple[Any, Any]:
    """Return the last carry and the outputs, and what the backward pass needs."""
    implementation, gating, dtype, axis = static
    if differentiable:
        arrays = _forbid(gating.name, arrays)

    def forward(*arrays: Any) -> Any:
        layer = Layer(gating, dtype, axis, *arrays)
        return implementation.forward(layer, differentiable=differentiable)

    merged = _merge(forward, (None, 1, 0, 1), ((0, 1), 2 - axis))
    results, residuals = merged(*arrays)
    return results, (arrays, residuals)


def _run_backward(static: tuple[Any, ...], residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    implementation, gating, dtype, axis = static
    (arrays, residuals), cotangents = _forbid(gating.name, (residuals, cotangents))

    def backward(*arrays: Any) -> Any:
        return implementation.backward(Layer(gating, dtype, axis, *arrays[:4]), *arrays[4:])

    merged = _merge(backward, (None, 1, 0, 1, 2 - axis, 0, 1), (1, 0))
    d_sums, d_carry = merged(*arrays, residuals, *cotangents)
    layer = Layer(gating, dtype, axis, *arrays)
    grads = *implementation.differentiate_params(layer, residuals, d_sums), d_carry
    return *jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, arrays[:3]), None


_run.defvjp(_run_forward, _run_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forbid(name: str, arrays: Any) -> Any:
    """Return arrays; differentiating a function of them is an error."""
    return arrays


@_forbid.defjvp
def _raise(name: str, *_: Any) -> Any:
    raise NotImplementedError(
        f"JAX can't differentiate the derivatives of the fast implementations of ops.{name}: "
        "pass implementation='scan'"
    )


def _merge(
    function: Callable[..., Any], in_axes: Sequence[Any], out_axes: tuple[Any, ...]
) -> Callable[..., Any]:
    """Let `vmap` run a function once, on one batch of all examples.

    The axes are those of the batch, for all arrays of an argument or result; None is that of
    parameters. If these differ between examples, each has a batch of its own.
    """
    merged = custom_vmap(function)

    def rule(number: int, in_batched: Sequence[Any], *arguments: Any) -> Any:
        def join(axis: int, x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x, (number, *x.shape))
            return jax.lax.collapse(jnp.moveaxis(x, 0, axis), axis, axis + 2)

        def divide(axis: int, x: Array) -> Array:
            shape = *x.shape[:axis], number, x.shape[axis] // number, *x.shape[axis + 1 :]
            return jnp.moveaxis(x.reshape(shape), axis, 0)

        if not number or any(jax.tree.leaves(in_batched[0])):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
            results = jax.vmap(function, axes)(*arguments)
        else:
            others = zip(in_axes[1:], arguments[1:], in_batched[1:], strict=True)
            batches = [jax.tree.map(functools.partial(join, axis), *x) for axis, *x in others]
            results = merged(arguments[0], *batches)
            results = jax.tree.map(divide, jax.tree.broadcast(out_axes, results), results)
        return results, jax.tree.map(lambda _: True, results)

    merged.def_vmap(rule)
    return merged
