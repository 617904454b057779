"""Check the arguments of the public functions, whose shapes and dtypes are known when traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lstm_jax.ops.gates import Gating


def convert_floats(name: str, value: ArrayLike, *axes: str) -> jax.Array:
    """Return a floating-point array with these axes.

    Raises:
      ValueError: if it has another dtype or number of axes.
    """
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has the dtype {array.dtype}: it must be a floating-point array")
    if array.ndim != len(axes):
        raise ValueError(f"{name} has the shape {array.shape}: it must be [{', '.join(axes)}]")
    return array


def convert_params(gating: Gating, params: Any, features: int) -> Any:
    """Return parameters as arrays, whose shapes fit together and to inputs of this many features.

    Raises:
      ValueError: if they do not.
    """
    if not isinstance(params, gating.params):
        raise ValueError(
            f"params is a {type(params).__name__}: ops.{gating.name} takes {gating.params.__name__}"
        )
    axes = {"bias": 1, "recurrent_bias": 1}
    arrays = [
        convert_floats(f"params.{name}", value, *("rows", "columns")[-axes.get(name, 2) :])
        for name, value in params._asdict().items()
    ]
    converted = gating.params(*arrays)
    size = len(converted.recurrent_kernel)
    if features != len(converted.input_kernel):
        raise ValueError(
            f"inputs have {features} features, but the input kernel has "
            f"{len(converted.input_kernel)} rows"
        )
    width = len(gating.read_inputs) * size
    shapes = {
        "input_kernel": (features, width),
        "recurrent_kernel": (size, width),
        "bias": (width,),
        "recurrent_bias": (size,),
        "peepholes": (3, size),
    }
    for name, array in converted._asdict().items():
        if array.shape != shapes[name]:
            raise ValueError(
                f"params.{name} has the shape {array.shape}: with a recurrent kernel of {size} "
                f"rows, which are the hidden units, it must be {shapes[name]}"
            )
    return converted


def convert_carry(kind: type[Any], carry: Any, shape: tuple[int, int], dtype: Any) -> Any:
    """Return a carry of arrays of this shape; zeros of this dtype for None.

    Raises:
      ValueError: if it is another one.
    """
    if carry is None:
        return kind(*(jnp.zeros(shape, dtype) for _ in kind._fields))
    if not isinstance(carry, tuple) or len(carry) != len(kind._fields):
        raise ValueError(
            f"carry is a {type(carry).__name__}: it must be {kind.__name__}"
            f"({', '.join(kind._fields)}), or None for zeros"
        )
    arrays = [
        convert_floats(f"carry.{name}", value, "batch", "hidden")
        for name, value in zip(kind._fields, carry, strict=True)
    ]
    for name, array in zip(kind._fields, arrays, strict=True):
        if array.shape != shape:
            raise ValueError(f"carry.{name} has the shape {array.shape}: it must be {shape}")
    return kind(*arrays)


def convert_flags(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Return an array as bool: true where it is not 0.

    Raises:
      ValueError: if its shape is another one.
    """
    if value is None:
        return None
    array = jnp.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}: it must be [batch, time], {shape}")
    return array.astype(bool)


def convert_lengths(value: ArrayLike | None, batch: int) -> jax.Array | None:
    """Return lengths as an integer array [batch].

    Raises:
      ValueError: if they have another dtype or shape.
    """
    if value is None:
        return None
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != (batch,):
        raise ValueError(
            f"lengths has the dtype {array.dtype} and the shape {array.shape}: it must be "
            f"integers [batch], ({batch},)"
        )
    return array
