"""Run a gated recurrence by a faster implementation, as primitives of JAX with their own rules.

Reverse-mode differentiation runs a loop over time that computes the cotangents of the sums, and
then one matmul for each kernel; forward-mode differentiation runs a scan. `vmap` over inputs and
carries makes one larger batch. These rules hold in any order, which those of `jax.custom_vjp` do
not: there, the gradient of a `vmap` would compute a gradient of the kernels for each example.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lstm_jax.ops import native, scan
from lstm_jax.ops.gates import Gating
from lstm_jax.ops.scan import Layer


class Implementation(NamedTuple):
    """A way to run a gated recurrence; `fused` shows the arguments and results of its functions."""

    name: str
    forward: Callable[..., tuple[tuple[Any, Array], Any]]
    backward: Callable[..., tuple[Any, Any]]
    differentiate_params: Callable[..., tuple[Any, Array]]
    batch_axis: int  # Of all arrays that `forward` saves, and of the cotangents of sums.
    is_exportable: bool = True  # Whether `jax.export` can serialize it.


class Call(NamedTuple):
    """The static arguments of a primitive."""

    gating: Gating
    implementation: Implementation
    dtype: str  # Of the factors of matmuls.
    structure: Any  # Of (parameters, inputs, carry, marks), the first operands.
    larger: Implementation | None = None  # For a batch of one text for each thread.
    saved: Any = None  # The structure of what `forward` saves, the operands after them.

    @property
    def size(self) -> int:
        """Return the number of the first operands."""
        return int(self.structure.num_leaves)

    @property
    def num_marks(self) -> int:
        """Return the number of marks, which are the last of the first operands."""
        return self.size - len(self.gating.params._fields) - 1 - len(self.gating.carry._fields)


def run(
    implementation: Implementation, larger: Implementation | None, layer: Layer
) -> tuple[Any, Float[Array, "time batch hidden"]]:
    """Return the last carry and the outputs.

    Under `vmap`, which makes one batch of all examples, `larger` runs one of as many texts as there
    are threads.
    """
    operands, structure = jax.tree.flatten(layer[1:-1])
    call = Call(layer.gating, implementation, layer.dtype, structure, larger)
    *leaves, outputs = _layer.bind(*_align(operands), call=call)
    return layer.gating.carry(*leaves), outputs


def _align(operands: list[Array]) -> list[Array]:
    """Let all operands vary over the same axes of a mesh, in a `shard_map` that checks them."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


# The functions of the primitives. All have the operands of `_layer` first.


def _run_layer(*operands: Array, call: Call) -> list[Array]:
    """Return the last carry and the outputs."""
    return jax.tree.leaves(call.implementation.forward(_make_layer(call, operands), False)[0])


def _run_forward(*operands: Array, call: Call) -> list[Array]:
    """Return the last carry, the outputs, and what is saved."""
    return jax.tree.leaves(_call_forward(call, operands))


def _make_layer(call: Call, operands: Sequence[Array]) -> Layer:
    params, inputs, carry, marks = jax.tree.unflatten(call.structure, operands[: call.size])
    return Layer(call.gating, params, inputs, carry, marks, call.dtype)


def _call_forward(call: Call, operands: Sequence[Array]) -> Any:
    return call.implementation.forward(_make_layer(call, operands), True)


def _run_backward(*operands: Array, call: Call) -> list[Array]:
    """Return the cotangents of the first carry and of the sums.

    After those of `_layer`, the operands are what was saved, and the cotangents of the results.
    """
    return jax.tree.leaves(_call_backward(call, operands))


def _call_backward(call: Call, operands: Sequence[Array]) -> Any:
    rest = jax.tree.unflatten(call.saved, operands[call.size :])
    return call.implementation.backward(_make_layer(call, operands), *rest)


def _run_gradients(*operands: Array, call: Call) -> list[Array]:
    """Return the cotangents of the parameters and of the inputs.

    After those of `_layer`, the operands are what was saved, and the cotangents of the sums.
    """
    rest = jax.tree.unflatten(call.saved, operands[call.size :])
    results = call.implementation.differentiate_params(_make_layer(call, operands), *rest)
    return jax.tree.leaves(results)


def _run_tangent(*operands: Array, call: Call) -> list[Array]:
    """Return the tangents of the last carry and the outputs, by a scan.

    After those of `_layer`, the operands are what was saved, and the tangents of all but the marks.
    """
    number = call.size - call.num_marks
    marks = operands[number : call.size]

    def run_scan(*operands: Array) -> list[Array]:
        return jax.tree.leaves(scan.run(_make_layer(call, (*operands, *marks))))

    return jax.jvp(run_scan, operands[:number], operands[-number:])[1]


def _infer_shapes(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Return the shapes and dtypes of the results of a function, as a tree like them."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    with _without_explicit_mesh():
        return jax.eval_shape(function, *shapes)


@contextlib.contextmanager
def _without_explicit_mesh() -> Iterator[None]:
    """Trace a function whose arrays have no shardings in their types."""
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        yield
    else:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            yield


_FUNCTIONS: dict[Primitive, Callable[..., list[Array]]] = {}


def _define(name: str, function: Callable[..., list[Array]]) -> Primitive:
    """Define a primitive that runs a function of arrays and of a static `call`."""
    primitive = Primitive(f"lstm_jax_{name}")
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(function, static_argnames="call"))

    def infer(*operands: Any, call: Call) -> list[Any]:
        results = _infer_shapes(functools.partial(function, call=call), operands)
        kind = operands[0].manual_axis_type  # That of all operands.
        manual: dict[str, Any] = {}
        if kind.varying:
            mesh = operands[0].sharding.mesh
            manual = {"manual_axis_type": kind, "sharding": NamedSharding(mesh, PartitionSpec())}
        return [jax.core.ShapedArray(x.shape, x.dtype, **manual) for x in results]

    def lower(context: Any, *operands: Any, call: Call) -> Any:
        module = context.module_context
        run: Callable[..., Any] = functools.partial(function, call=call)
        if module.lowering_parameters.for_export and not call.implementation.is_exportable:
            raise ValueError(_REMEDY.format("jax.export does not support", call.gating.name))
        devices = getattr(module.axis_context, "device_assignment", None) or ()
        if primitive is not _tangent and len(devices) > 1:
            run = _divide_batch(primitive, run, call, context.avals_in, context.avals_out)
        plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
        with _without_explicit_mesh():
            inner = mlir.lower_fun(run, multiple_results=True)
            return inner(context.replace(avals_in=plain), *operands)

    # `custom_partitioning` needs the devices, which JAX passes to the rules of these primitives.
    primitives: set[Primitive] = getattr(dispatch, "prim_requires_devices_during_lowering", set())
    primitives.add(primitive)
    _FUNCTIONS[primitive] = function
    primitive.def_abstract_eval(infer)
    mlir.register_lowering(primitive, lower)
    return primitive


_REMEDY = "{} the fast implementations of ops.{}: pass implementation='scan'"
_layer = _define("layer", _run_layer)
_forward = _define("forward", _run_forward)
_backward = _define("backward", _run_backward)
_gradients = _define("gradients", _run_gradients)
_tangent = _define("tangent", _run_tangent)


def _differentiate(
    primals: Sequence[Array], tangents: Sequence[Any], *, call: Call
) -> tuple[list[Array], list[Array]]:
    """Run a layer, and the linear map from the tangents of its operands to those of its results."""
    (carry, outputs), saved = _infer_shapes(
        lambda *operands: _call_forward(call, operands), primals
    )
    results = _forward.bind(*primals, call=call)
    number = len(carry) + 1
    linear = call._replace(saved=jax.tree.structure((saved, carry, outputs)))
    known = map(ad.instantiate_zeros, tangents[: call.size - call.num_marks])
    after = _tangent.bind(*primals, *results[number:], *known, call=linear)
    return results[:number], after


def _transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> list[Any]:
    """Return the cotangents of the operands of `_tangent`, which is linear in the last of them."""
    known = operands[: call.num_marks - call.size]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    results = _backward.bind(*known, *cotangents, call=call)
    arrays = *known, *cotangents
    template = _infer_shapes(lambda *operands: _call_backward(call, operands), arrays)
    d_sums, d_carry = jax.tree.unflatten(jax.tree.structure(template), results)
    saved, *_ = jax.tree.unflatten(call.saved, [*known[call.size :], *cotangents])
    rest, structure = jax.tree.flatten((saved, d_sums))
    of_sums = call._replace(saved=structure)
    gradients = _gradients.bind(*known[: call.size], *rest, call=of_sums)
    return [None] * len(known) + [*gradients, *d_carry]


def _refuse(*_: Any, call: Call) -> Any:
    message = "JAX can't differentiate the derivatives of"
    raise NotImplementedError(_REMEDY.format(message, call.gating.name))


ad.primitive_jvps[_layer] = _differentiate
ad.primitive_transposes[_tangent] = _transpose
for primitive in (_forward, _backward, _gradients, _tangent):
    ad.primitive_jvps[primitive] = _refuse


def _batch(
    primitive: Primitive, operands: Sequence[Array], axes: Sequence[int | None], *, call: Call
) -> tuple[list[Array], list[int]]:
    """Run a primitive on operands with an additional axis, which `axes` names, or None.

    Without one in the parameters, it joins the batch; otherwise every matmul has a further axis.
    """
    own = _list_batch_axes(primitive, call, len(operands))
    if any(axis is not None and of_batch is None for axis, of_batch in zip(axes, own, strict=True)):
        return _batch_each(primitive, operands, axes, call=call)
    number = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)

    def join(x: Array, axis: int | None, of_batch: int | None) -> Array:
        if of_batch is None:
            return x
        if axis is None:
            x, axis = jnp.broadcast_to(x, (number, *x.shape)), 0
        at = of_batch % (x.ndim - 1)
        x = jnp.moveaxis(x, axis, at)
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    joined = list(map(join, operands, axes, own))
    batch = joined[len(call.gating.params._fields)].shape[1]
    if primitive is _layer and call.larger and batch >= native.count_threads():
        call = call._replace(implementation=call.larger)
    results = primitive.bind(*joined, call=call)
    places = _list_batch_axes(primitive, call, len(results), of_results=True)
    ats = [place % x.ndim for x, place in zip(results, places, strict=True) if place is not None]
    parts = [
        x.reshape(*x.shape[:at], number, -1, *x.shape[at + 1 :])
        for x, at in zip(results, ats, strict=True)
    ]
    return parts, ats


def _list_batch_axes(
    primitive: Primitive, call: Call, number: int, of_results: bool = False
) -> list[int | None]:
    """Return the axis of the batch in each operand or result, None in parameters."""
    carry, saved = [0] * len(call.gating.carry._fields), call.implementation.batch_axis
    params = [None] * len(call.gating.params._fields)
    if of_results and primitive is _gradients:
        return [*params, 1]
    if of_results and primitive is _backward:
        return [*[saved] * (number - len(carry)), *carry]
    if of_results:
        return [*carry, 1, *[saved] * (number - len(carry) - 1)]
    last = [*carry, 1] if primitive is _backward else []
    first = [*params, 1, *carry, *[1] * call.num_marks]
    return [*first, *[saved] * (number - len(first) - len(last)), *last]


def _divide_batch(
    primitive: Primitive,
    function: Callable[..., list[Array]],
    call: Call,
    operands: Sequence[Any],
    results: Sequence[Any],
) -> Callable[..., Any]:
    """Return a function that each device of a plain `jit` runs on its part of the batch.

    XLA would gather the operands of a call of the library, and some arrays of loops.
    """
    from jax.experimental.custom_partitioning import custom_partitioning

    own = _list_batch_axes(primitive, call, len(operands))
    of_results = _list_batch_axes(primitive, call, len(results), of_results=True)
    count = itertools.count()
    others: list[str] = []

    def name_axes(x: Any, of_batch: int | None) -> str:
        at = None if of_batch is None else of_batch % x.ndim
        names = ["b" if axis == at else f"x{next(count)}" for axis in range(x.ndim)]
        others.extend(name for name in names if name != "b")
        return " ".join(names)

    sides = (operands, own), (results, of_results)
    rule = " -> ".join(", ".join(map(name_axes, *side)) for side in sides)

    def partition(mesh: Any, shapes: Sequence[Any], result_shapes: Sequence[Any]) -> Any:
        pairs = zip(shapes, own, strict=True)
        names = next(x.sharding.spec[axis % x.ndim] for x, axis in pairs if axis is not None)

        def place(x: Any, axis: int | None) -> NamedSharding:
            spec = [None] * x.ndim
            if axis is not None:
                spec[axis % x.ndim] = names
            return NamedSharding(mesh, PartitionSpec(*spec))

        def run(*operands: Array) -> tuple[Array, ...]:
            results = zip(function(*operands), of_results, strict=True)
            return tuple(jax.lax.psum(x, names) if axis is None else x for x, axis in results)

        placed = tuple(map(place, result_shapes, of_results))
        return mesh, run if names else function, placed, tuple(map(place, shapes, own))

    divided = custom_partitioning(lambda *operands: tuple(function(*operands)))
    divided.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(others))
    return divided


def _batch_each(
    primitive: Primitive, operands: Sequence[Array], axes: Sequence[int | None], *, call: Call
) -> tuple[list[Array], list[int]]:
    """Run a primitive's function on operands with an additional axis, which results have, too."""
    function = functools.partial(_FUNCTIONS[primitive], call=call)
    results = jax.vmap(function, in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


for primitive in (_layer, _forward, _backward):
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
for primitive in (_gradients, _tangent):
    batching.primitive_batchers[primitive] = functools.partial(_batch_each, primitive)
