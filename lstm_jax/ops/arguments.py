"""Check the arguments of the public functions, whose shapes and dtypes are known when traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, jaxtyped


def check(**arguments: tuple[Any, Any]) -> list[Any]:
    """Return arguments as arrays or NamedTuples of arrays; None stays.

    Each is given with its annotation of jaxtyping, or with a NamedTuple whose fields have some.
    Sizes of the same name must be the same in all.

    Raises:
      ValueError: if a shape, a dtype or a number of fields does not fit.
    """
    checked: list[Any] = []
    with jaxtyped("context"):
        for name, (value, kind) in arguments.items():
            if value is None:
                checked.append(None)
                continue
            fields = getattr(kind, "_fields", ())
            if fields and not (isinstance(value, tuple) and len(value) == len(fields)):
                raise ValueError(
                    f"{name} is a {type(value).__name__}: it must be {kind.__name__}"
                    f"({', '.join(fields)})"
                )
            parts = dict(zip(fields, value, strict=True)) if fields else {"": value}
            # The recurrent kernel first: its annotation has the hidden size alone.
            for field in sorted(parts, key=lambda field: field != "recurrent_kernel"):
                annotation = kind.__annotations__[field] if fields else kind
                array = parts[field] = jnp.asarray(parts[field])
                if not isinstance(array, annotation):
                    dtype, shape = annotation.__name__.split("[")[0], annotation.dim_str.strip()
                    raise ValueError(
                        f"{name}{field and '.'}{field} is {array.dtype} {list(array.shape)}: it "
                        f"must be {dtype.lower()} [{shape}], with the sizes of the other arrays"
                    )
            checked.append(kind(**parts) if fields else parts[""])
    return checked


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
