"""Check the arguments of the public functions, whose shapes and dtypes are known when traced.

What does not fit raises a `ValueError` that names the array.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped

from lstm_jax.ops.gates import Gating


def convert_floats(name: str, value: ArrayLike, *axes: int | str) -> Float[Array, "..."]:
    """Return a floating-point array with these axes, of the sizes that are numbers, or raise."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has the dtype {array.dtype}: it must be a floating-point array")
    fits = all(isinstance(a, str) or a == size for a, size in zip(axes, array.shape, strict=False))
    if array.ndim != len(axes) or not fits:
        wanted = ", ".join(map(str, axes))
        raise ValueError(f"{name} has the shape {array.shape}: it must be [{wanted}]")
    return array


def convert_params(gating: Gating, params: Any, features: int) -> Any:
    """Return parameters as arrays, which fit together and to the inputs, or raise."""
    if not isinstance(params, gating.params):
        raise ValueError(
            f"params is a {type(params).__name__}: ops.{gating.name} takes {gating.params.__name__}"
        )
    size = len(convert_floats("params.recurrent_kernel", params.recurrent_kernel, "hidden", "n"))
    width = gating.num_gates * size
    rows = len(convert_floats("params.input_kernel", params.input_kernel, "features", width))
    if features != rows:
        raise ValueError(f"inputs have {features} features, but the input kernel has {rows} rows")
    shapes = {
        "input_kernel": (features, width),
        "recurrent_kernel": (size, width),
        "bias": (width,),
        "recurrent_bias": (size,),
        "peepholes": (3, size),
    }
    arrays = (
        convert_floats(f"params.{name}", value, *shapes[name])
        for name, value in params._asdict().items()
    )
    return gating.params(*arrays)


def convert_carry(kind: type[Any], carry: Any, *shapes: Sequence[int]) -> Any:
    """Return a carry of arrays of these shapes, or raise."""
    if not isinstance(carry, tuple) or len(carry) != len(kind._fields):
        raise ValueError(
            f"carry is a {type(carry).__name__}: it must be {kind.__name__}"
            f"({', '.join(kind._fields)}), or None for zeros"
        )
    parts = zip(kind._fields, carry, shapes, strict=True)
    return kind(*(convert_floats(f"carry.{name}", value, *shape) for name, value, shape in parts))


def convert_reset(
    reset: Shaped[ArrayLike, "..."] | None, batch: int, time: int
) -> Bool[Array, "batch time"] | None:
    """Return an array as bool, true where it is not 0, or raise."""
    if reset is None:
        return None
    array = jnp.asarray(reset)
    if array.shape != (batch, time):
        raise ValueError(
            f"reset has the shape {array.shape}: it must be [batch, time], {(batch, time)}"
        )
    return array.astype(bool)


def convert_lengths(
    lengths: Shaped[ArrayLike, "..."] | None, batch: int
) -> Integer[Array, " batch"] | None:
    """Return lengths as an integer array, or raise."""
    if lengths is None:
        return None
    array = jnp.asarray(lengths)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != (batch,):
        raise ValueError(
            f"lengths has the dtype {array.dtype} and the shape {array.shape}: it must be "
            f"integers [batch], ({batch},)"
        )
    return array


def choose_dtypes(dtype: DTypeLike | None, inputs: Array, *others: Any) -> tuple[str, Any]:
    """Return the dtype that factors of matmuls are rounded to, and that of all other arrays."""
    if dtype is not None and jnp.dtype(dtype).name not in ("bfloat16", "float32", "float64"):
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}: matmuls are in bfloat16 or float32")
    low = "bfloat16" if jnp.dtype(dtype or inputs.dtype) == jnp.bfloat16 else "float32"
    return low, jnp.promote_types(jnp.result_type(inputs, *jax.tree.leaves(others)), "float32")


def align(arrays: Any) -> Any:
    """Let all arrays vary over the same axes of a mesh, in a `shard_map` that checks them."""
    leaves, structure = jax.tree.flatten(arrays)
    axes = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    union = frozenset().union(*axes)
    aligned = [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(structure, aligned)
