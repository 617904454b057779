"""The public functions: gated recurrent layers over arrays.

Each checks its arguments, chooses an implementation (`choice.py`), and handles lengths and
direction. `gates.py` has the equations of a step and their derivatives, `xla.py` the reference
implementation and the loops forwards and backwards in time, `in_c.py` and `lstm.c` the same in C;
`recurrence.py` makes these differentiable.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer, Shaped, jaxtyped

from lstm_jax.ops import choice, in_c, recurrence, xla
from lstm_jax.ops.gates import (
    GRU,
    LSTM,
    PEEPHOLE_LSTM,
    RNN,
    Gating,
    GRUParams,
    HiddenCarry,
    Layer,
    LSTMCarry,
    LSTMParams,
    Marks,
    PeepholeLSTMParams,
    RNNParams,
)
from lstm_jax.ops.recurrence import Implementation

Name = Literal["auto", "scan", "xla", "c"]


class Options(TypedDict, total=False):
    """The keyword arguments of all gated layers, all optional; `lstm` explains them."""

    reset: Shaped[ArrayLike, "batch time"] | None  # Steps that read a carry of zeros.
    lengths: Integer[ArrayLike, " batch"] | None  # Without it, all steps are computed.
    reverse: bool  # By default False.
    dtype: DTypeLike | None  # By default that of the inputs.
    implementation: Name  # By default "auto".


def lstm(
    params: LSTMParams,
    inputs: Float[ArrayLike, "batch time features"],
    carry: LSTMCarry | None = None,
    *,
    reset: Shaped[ArrayLike, "batch time"] | None = None,
    lengths: Integer[ArrayLike, " batch"] | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[LSTMCarry, Float[Array, "batch time hidden"]]:
    """Run a long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000) over time.

        i, f, o = sigmoid(x W + h U + b) of the gate, and g = tanh(x W + h U + b)
        c' = f * c + i * g
        h' = o * tanh(c')

    Args:
      params: the kernels and the bias, with the gates in the order i, f, g, o.
      inputs: floats [batch, time, features].
      carry: the carry before the first step that is computed; zeros without one.
      reset: [batch, time], true or not 0 at the steps that first set the carry to zeros: for
        example where a document or an episode begins.
      lengths: integers [batch], from 0 to `time`, which is not checked. Later steps leave the carry
        as it is, and their outputs are zero.
      reverse: whether to run from the last step (of each length) to the first. Outputs stay at the
        place of their inputs.
      dtype: "bfloat16" rounds the operands of matmuls, and in C also biases; sums are float32.
        "float32" rounds nothing. By default, that of the inputs. States are float32, or float64 if
        any array is; without one, "float64" is an error.
      implementation: "scan" can be transformed in every way (but not by `jvp` in bfloat16 on GPUs
        and TPUs); "xla" and "c" (on CPUs) are faster; "auto" chooses.

    Returns:
      The last carry, in the dtypes of the carry or else that of states; and the outputs [batch,
      time, hidden], which are the hidden states, in the dtype of the inputs.

    Raises:
      ValueError: if a type, shape or dtype does not fit, or the implementation can't run this here.
      TypeError: if `dtype` is no dtype.
    """
    return _run(LSTM, params, inputs, carry, reset, lengths, reverse, dtype, implementation)


def peephole_lstm(
    params: PeepholeLSTMParams,
    inputs: Float[ArrayLike, "batch time features"],
    carry: LSTMCarry | None = None,
    **options: Unpack[Options],
) -> tuple[LSTMCarry, Float[Array, "batch time hidden"]]:
    """Run an LSTM whose gates see the cell state (Gers & Schmidhuber 2000) over time.

        i, f = sigmoid(x W + h U + p * c + b) of the gate, and g = tanh(x W + h U + b)
        c' = f * c + i * g
        o = sigmoid(x W + h U + p * c' + b)
        h' = o * tanh(c')

    Options are `ops.Options`; arguments, results and errors are those of `lstm`.
    """
    return _run(PEEPHOLE_LSTM, params, inputs, carry, **options)


def gru(
    params: GRUParams,
    inputs: Float[ArrayLike, "batch time features"],
    carry: HiddenCarry | None = None,
    **options: Unpack[Options],
) -> tuple[HiddenCarry, Float[Array, "batch time hidden"]]:
    """Run a gated recurrent unit (Cho et al. 2014), cuDNN's and PyTorch's variant, over time.

        r, z = sigmoid(x W + h U + b) of the gate
        n = tanh(x W + b + r * (h U + un))
        h' = (1 - z) * n + z * h

    Options are `ops.Options`; arguments, results and errors are those of `lstm`. The gates are in
    the order r, z, n.
    """
    return _run(GRU, params, inputs, carry, **options)


def rnn(
    params: RNNParams,
    inputs: Float[ArrayLike, "batch time features"],
    carry: HiddenCarry | None = None,
    **options: Unpack[Options],
) -> tuple[HiddenCarry, Float[Array, "batch time hidden"]]:
    """Run a simple recurrent network (Elman 1990) over time.

        h' = tanh(x W + h U + b)

    Options are `ops.Options`; arguments, results and errors are those of `lstm`.
    """
    return _run(RNN, params, inputs, carry, **options)


GATINGS: dict[type[Any], Gating] = {
    gating.params: gating for gating in (LSTM, PEEPHOLE_LSTM, GRU, RNN)
}


# A carry with a cell state, and one without, by the type of the parameters.
_CellParams = LSTMParams | PeepholeLSTMParams
_HiddenParams = GRUParams | RNNParams


@overload
def run(
    params: _CellParams, inputs: Any, carry: LSTMCarry | None = None, **options: Unpack[Options]
) -> tuple[LSTMCarry, Array]: ...
@overload
def run(
    params: _HiddenParams, inputs: Any, carry: HiddenCarry | None = None, **options: Unpack[Options]
) -> tuple[HiddenCarry, Array]: ...
def run(
    params: Any,
    inputs: Float[ArrayLike, "batch time features"],
    carry: Any = None,
    **options: Unpack[Options],
) -> tuple[Any, Float[Array, "batch time hidden"]]:
    """Run the gated layer with these parameters, an instance of `LSTMParams` or another, over time.

    Options are `ops.Options`; arguments, results and errors are those of `lstm`.
    """
    return _run(_get_gating(params), params, inputs, carry, **options)


def _get_gating(params: Any) -> Gating:
    if type(params) not in GATINGS:
        listed = ", ".join(kind.__name__ for kind in GATINGS)
        raise ValueError(f"params is a {type(params).__name__}: it must be one of {listed}")
    return GATINGS[type(params)]


@overload
def step(
    params: _CellParams, inputs: Any, carry: LSTMCarry, *, reset: Any = ..., dtype: Any = ...
) -> tuple[LSTMCarry, Array]: ...
@overload
def step(
    params: _HiddenParams, inputs: Any, carry: HiddenCarry, *, reset: Any = ..., dtype: Any = ...
) -> tuple[HiddenCarry, Array]: ...
def step(
    params: Any,
    inputs: Float[ArrayLike, "batch features"],
    carry: Any,
    *,
    reset: Shaped[ArrayLike, " batch"] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Any, Float[Array, "batch hidden"]]:
    """Run one step of the layer with these parameters, for example to generate a token.

    Inputs are [batch, features], and `carry` is the one before; `reset` [batch] is true where the
    step reads a carry of zeros instead. Return the next carry, and the outputs [batch, hidden]. A
    loop over it is slower than one call over time.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    steps, marks = (
        None if x is None else jnp.expand_dims(jnp.asarray(x), axis=1) for x in (inputs, reset)
    )
    carry, outputs = run(params, steps, carry, reset=marks, dtype=dtype, implementation="scan")
    return carry, outputs[:, 0]


def _run(
    gating: Gating,
    params: Any,
    inputs: Any,
    carry: Any,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> tuple[Any, Float[Array, "batch time hidden"]]:
    """Check the arguments, and run a layer."""
    inputs, params, carry, reset, lengths = check(
        inputs=(inputs, Float[Array, "batch time features"]),
        params=(params, gating.params),
        carry=(carry, gating.carry),
        reset=(reset, Shaped[Array, "batch time"]),
        lengths=(lengths, Integer[Array, " batch"]),
    )
    (batch, time, _), hidden = inputs.shape, len(params.recurrent_kernel)
    if not hidden:
        raise ValueError("params.recurrent_kernel has no row: a layer needs at least one")
    low, wide = choose_dtypes(dtype, inputs, params, carry)
    first = gating.carry.zeros(batch, hidden, wide) if carry is None else carry
    name = choice.choose(
        implementation if time else "scan",
        gating,
        size=hidden,
        dtype=low if wide == jnp.float32 else wide.name,
    )
    run_layer = find_implementation(name, jax.default_backend())
    arrays = params, inputs, first, reset, lengths
    return _compute(gating, run_layer, reverse, wide, low, *arrays)


@functools.cache
def find_implementation(name: str, backend: str) -> Callable[[Layer], tuple[Any, Array]]:
    """Return the function that runs a layer on a kind of device."""
    if name == "scan":
        return xla.scan
    if name == "c":
        return _run_in_c
    axis = 0 if backend == "cpu" else 1
    made = Implementation(
        functools.partial(xla.forward, axis=axis),
        functools.partial(xla.backward, axis=axis),
        functools.partial(xla.differentiate_params, axis=axis),
        batch_axis=2 - axis,
    )
    return functools.partial(recurrence.run, made)


_IN_C = Implementation(in_c.forward, in_c.backward, in_c.differentiate_params, batch_axis=1)


def _run_in_c(layer: Layer) -> tuple[Any, Float[Array, "time batch hidden"]]:
    """Run a layer with as many hidden units as the library needs, and return those of the layer.

    The rows of the added units are zero, so no other unit reads them. Their columns are tiny: zero
    times an infinite input would be NaN, and all units read zero times that NaN.
    """
    params, hidden = layer.params, layer.carry.hidden.shape[1]
    rows = jnp.pad(params.recurrent_kernel, ((0, -hidden % in_c.count_lanes()), (0, 0)))
    kernels = [in_c.pad_units(x, hidden, 1e-20) for x in (params.input_kernel, rows)]
    arrays = params[2:], layer.carry
    others, carry = jax.tree.map(lambda x: in_c.pad_units(x, hidden), arrays)
    params = layer.gating.params(*kernels, *others)
    results = recurrence.run(_IN_C, layer._replace(params=params, carry=carry))
    return jax.tree.map(lambda x: x[..., :hidden], results)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compute(
    gating: Gating,
    run_layer: Callable[[Layer], tuple[Any, Array]],
    reverse: bool,
    wide: Any,
    low: str,
    params: Any,
    inputs: Float[Array, "batch time features"],
    first: Any,
    reset: Shaped[Array, "batch time"] | None,
    lengths: Integer[Array, " batch"] | None,
) -> tuple[Any, Float[Array, "batch time hidden"]]:
    """Run a layer with arrays of the dtype `wide`."""

    def run(params: Any, inputs: Array, first: Any, marks: Marks) -> tuple[Any, Array]:
        arrays = params, inputs.swapaxes(0, 1), first
        wider, steps, carry = jax.tree.map(lambda x: x.astype(wide), arrays)
        marks = jax.tree.map(jnp.transpose, marks)
        last, outputs = run_layer(Layer(gating, wider, steps, carry, marks, low))
        return last, outputs.swapaxes(0, 1)

    last, outputs = run_in_order(run, params, inputs, first, reset, lengths, reverse)
    last = jax.tree.map(lambda x, y: x.astype(y.dtype), last, first)
    return last, outputs.astype(inputs.dtype)


def check(**arguments: tuple[Any, Any]) -> list[Any]:
    """Return arguments as arrays or NamedTuples of arrays; None stays.

    Each is given with its annotation of jaxtyping, or with a NamedTuple whose fields have some.
    Sizes of the same name must be the same in all.

    Raises:
      ValueError: if a shape, a dtype or the type of a NamedTuple does not fit.
    """
    checked: list[Any] = []
    with jaxtyped("context"):
        for name, (value, kind) in arguments.items():
            if value is None:
                checked.append(None)
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
            checked.append(kind(**parts) if fields else parts[""])
    return checked


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
    run: Callable[[Any, Any, Any, Marks], tuple[Any, Array]],
    params: Any,
    inputs: Any,
    first: Any,
    reset: Any,
    lengths: Any,
    reverse: bool,
) -> tuple[Any, Float[Array, "batch time hidden"]]:
    """Run a layer over inputs, arrays [batch, time, ...], within lengths and in a direction.

    `run` gets the parameters, the inputs in the order of the steps, which are zero beyond the
    lengths, the first carry and the marks of steps, [batch, time]; it returns the last carry and
    the outputs, in the same order. `reset` and `lengths` are None or arrays, [batch, time] and
    integers [batch].
    """

    def run_part(params: Any, inputs: Any, first: Any, reset: Any, lengths: Any) -> Any:
        frozen: Any = None
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
        last, outputs = run(params, inputs, first, Marks(reset, frozen))
        if lengths is not None:
            outputs = jnp.where(frozen[..., None], 0, outputs)
        return last, reverse_time(outputs, lengths) if reverse else outputs

    return _divide_batch(run_part, params, inputs, first, reset, lengths)


def _divide_batch(run: Callable[..., Any], params: Any, inputs: Any, *others: Any) -> Any:
    """Call `run`; on a mesh with explicit axes, on each device with its part of the batch.

    The batch is the first axis of all arrays but parameters.
    """
    arrays = params, inputs, *others
    # Without `jax.set_mesh`, only the types of arrays have the mesh.
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None or AxisType.Manual in mesh.axis_types:  # In a `shard_map`.
        return run(*arrays)
    batch = PartitionSpec(jax.typeof(jax.tree.leaves(inputs)[0]).sharding.spec[0])
    specs = PartitionSpec(), *[batch] * len(arrays[1:])

    @jax.jit  # Without it, `reshard` needs `jax.set_mesh`.
    def run_parts(*arrays: Any) -> Any:
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        placed = jax.tree.map(lambda place, x: jax.sharding.reshard(x, place), places, arrays)
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=batch)(*placed)

    return run_parts(*arrays)


def reverse_time(
    x: Shaped[Array, "batch time ..."], lengths: Integer[Array, " batch"] | None
) -> Shaped[Array, "batch time ..."]:
    """Return x with the steps, those within each length, in reverse order."""
    if lengths is None:
        return jnp.flip(x, axis=1)
    time = jnp.arange(x.shape[1])[None]
    order = jnp.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
