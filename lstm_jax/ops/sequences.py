"""What all recurrences share: checks of arguments, resets, lengths, direction, and meshes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer, Shaped, jaxtyped

from lstm_jax.ops.gates import Marks

Inputs = Float[ArrayLike, "batch time features"]
Outputs = Float[Array, "batch time hidden"]
Reset = Shaped[ArrayLike, "batch time"] | None
Lengths = Integer[ArrayLike, " batch"] | None


def check(**arguments: tuple[Any, Any]) -> list[Any]:
    """Return arguments as arrays or NamedTuples of arrays; None stays.

    Each is given with its annotation of jaxtyping, or with a NamedTuple whose fields have some.
    Sizes of the same name must be the same in all.

    Raises:
      ValueError: if a shape, a dtype or the type of a NamedTuple does not fit.
    """
    results: list[Any] = []
    with jaxtyped("context"):
        for name, (value, kind) in arguments.items():
            if value is None:
                results.append(None)
                continue
            fields = getattr(kind, "_fields", ())
            if fields and not isinstance(value, kind):
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
            results.append(kind(**parts) if fields else parts[""])
    return results


def choose_dtypes(dtype: DTypeLike | None, inputs: Array, *others: Any) -> tuple[str, Any]:
    """Return the dtype that operands of matmuls are rounded to, and that of all other arrays."""
    wide = jnp.promote_types(jnp.result_type(inputs, *jax.tree.leaves(others)), "float32")
    name = jnp.dtype(dtype or inputs.dtype).name
    if dtype is not None and name not in ("bfloat16", "float32", wide.name):
        raise ValueError(
            f"dtype is {name}: matmuls are in bfloat16 or float32, or in float64 if an array is"
        )
    return "bfloat16" if name == "bfloat16" else "float32", wide


def run_in_order(
    run: Callable[..., tuple[Any, Array]], wide: Any, reverse: bool, *arrays: Any
) -> tuple[Any, Outputs]:
    """Run a layer within lengths and in a direction.

    `arrays` are the parameters; the inputs, arrays [batch, time, ...]; the first carry; and `reset`
    [batch, time] and `lengths` [batch], or None. `run` gets the parameters, the inputs in the order
    of the steps, zero beyond the lengths, and the first carry, all with the dtype `wide`, and
    `Marks` [batch, time]. It returns the last carry and the outputs, in the same order.
    """

    def run_part(params: Any, inputs: Any, first: Any, reset: Any, lengths: Any) -> Any:
        frozen: Any = None
        dtype = jnp.result_type(*jax.tree.leaves(inputs))
        if reset is not None:
            reset = reset.astype(bool)
        if reverse:
            inputs, reset = jax.tree.map(lambda x: reverse_time(x, lengths), (inputs, reset))
        if lengths is not None:
            time = jax.tree.leaves(inputs)[0].shape[1]
            frozen = jnp.arange(time)[None] >= lengths[:, None]
            # What is there may not be finite.
            inputs = jax.tree.map(lambda x: jnp.where(frozen[..., None], 0, x), inputs)
            reset = None if reset is None else reset & ~frozen
        params, inputs, carry = jax.tree.map(lambda x: x.astype(wide), (params, inputs, first))
        last, outputs = run(params, inputs, carry, Marks(reset, frozen))
        if lengths is not None:
            outputs = jnp.where(frozen[..., None], 0, outputs)
        last = jax.tree.map(lambda x, y: x.astype(y.dtype), last, first)
        return last, (reverse_time(outputs, lengths) if reverse else outputs).astype(dtype)

    return _divide_batch(run_part, *arrays)


def _divide_batch(run: Callable[..., Any], *arrays: Any) -> Any:
    """Call `run`; on a mesh with explicit axes, on each device with its part of the batch.

    The batch is the first axis of all arrays but the first, parameters.
    """
    # Without `jax.set_mesh`, only the types of arrays have the mesh.
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None or AxisType.Manual in mesh.axis_types:  # In a `shard_map`.
        return run(*arrays)
    batch = PartitionSpec(jax.typeof(jax.tree.leaves(arrays[1])[0]).sharding.spec[0])
    specs = PartitionSpec(), *[batch] * len(arrays[1:])

    @jax.jit  # Without it, `reshard` needs `jax.set_mesh`.
    def run_parts(*arrays: Any) -> Any:
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        placed = jax.tree.map(lambda place, x: jax.sharding.reshard(x, place), places, arrays)
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=batch)(*placed)

    return run_parts(*arrays)


def reverse_time(x: Array, lengths: Array | None) -> Array:
    """Return x [batch, time, ...] with the steps, those within each length, in reverse order."""
    if lengths is None:
        return jnp.flip(x, axis=1)
    time = jnp.arange(x.shape[1])[None]
    order = jnp.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
