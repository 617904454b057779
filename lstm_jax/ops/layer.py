"""The public functions: gated recurrent layers over arrays.

Each checks its arguments, chooses an implementation, and treats resets, lengths and direction.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lstm_jax.ops import accelerator, choice, cudnn, fused, in_c, recurrence, scan
from lstm_jax.ops.arguments import (
    convert_carry,
    convert_flags,
    convert_floats,
    convert_lengths,
    convert_params,
)
from lstm_jax.ops.gates import (
    GRU,
    LSTM,
    PEEPHOLE_LSTM,
    RNN,
    Gating,
    GRUParams,
    HiddenCarry,
    LSTMCarry,
    LSTMParams,
    PeepholeLSTMParams,
    RNNParams,
)
from lstm_jax.ops.recurrence import Implementation
from lstm_jax.ops.scan import Marks

Name = Literal["auto", "scan", "xla", "c", "cudnn", "pallas"]


def lstm(
    params: LSTMParams,
    inputs: ArrayLike,
    carry: LSTMCarry | None = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[LSTMCarry, jax.Array]:
    """Run a long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000) over time.

        i, f, o = sigmoid(x W + h U + b) of the gate, and g = tanh(x W + h U + b)
        c' = f * c + i * g
        h' = o * tanh(c')

    Args:
      params: the kernels and the bias, with the gates in the order i, f, g, o.
      inputs: floats [batch, time, features].
      carry: the carry before the first step that is computed; zeros without one.
      reset: [batch, time], true or not 0 at the steps that read a carry of zeros, before their
        input: for example where a document or an episode begins.
      lengths: integers [batch]. Later steps leave the carry as it is, and their outputs are zero.
      reverse: whether to run from the last step (of each length) to the first. Outputs stay at the
        place of their inputs.
      dtype: of the factors of matmuls, which are summed in float32; that of the inputs without one
        (float32 for float16). States are float32, or float64 if any array is.
      implementation: "scan" can be transformed in every way; "xla", "c" (on CPUs with AVX-512),
        "cudnn" (on NVIDIA's GPUs) and "pallas" (on TPUs) are faster; "auto" chooses.

    Returns:
      The last carry, and the outputs [batch, time, hidden], which are the hidden states, in the
      dtype of the inputs.

    Raises:
      ValueError: if a shape or dtype does not fit, or the implementation can't run this here.
    """
    return _run(LSTM, params, inputs, carry, reset, lengths, reverse, dtype, implementation)


def peephole_lstm(
    params: PeepholeLSTMParams,
    inputs: ArrayLike,
    carry: LSTMCarry | None = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[LSTMCarry, jax.Array]:
    """Run an LSTM whose gates see the cell state (Gers & Schmidhuber 2000) over time.

        i, f = sigmoid(x W + h U + p * c + b) of the gate, and g = tanh(x W + h U + b)
        c' = f * c + i * g
        o = sigmoid(x W + h U + p * c' + b)
        h' = o * tanh(c')

    Arguments, results and errors are those of `lstm`.
    """
    return _run(
        PEEPHOLE_LSTM, params, inputs, carry, reset, lengths, reverse, dtype, implementation
    )


def gru(
    params: GRUParams,
    inputs: ArrayLike,
    carry: HiddenCarry | None = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[HiddenCarry, jax.Array]:
    """Run a gated recurrent unit (Cho et al. 2014), cuDNN's and PyTorch's variant, over time.

        r, z = sigmoid(x W + h U + b) of the gate
        n = tanh(x W + b + r * (h U + un))
        h' = (1 - z) * n + z * h

    Arguments, results and errors are those of `lstm`; the gates are in the order r, z, n.
    """
    return _run(GRU, params, inputs, carry, reset, lengths, reverse, dtype, implementation)


def rnn(
    params: RNNParams,
    inputs: ArrayLike,
    carry: HiddenCarry | None = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[HiddenCarry, jax.Array]:
    """Run a simple recurrent network (Elman 1990) over time.

        h' = tanh(x W + h U + b)

    Arguments, results and errors are those of `lstm`.
    """
    return _run(RNN, params, inputs, carry, reset, lengths, reverse, dtype, implementation)


GATINGS: dict[type[Any], Gating] = {
    gating.params: gating for gating in (LSTM, PEEPHOLE_LSTM, GRU, RNN)
}


def run(
    params: Any,
    inputs: ArrayLike,
    carry: Any = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[Any, jax.Array]:
    """Run the gated layer with these parameters, an instance of `LSTMParams` or another, over time.

    Arguments, results and errors are those of `lstm`.
    """
    gating = _get_gating(params)
    return _run(gating, params, inputs, carry, reset, lengths, reverse, dtype, implementation)


def _get_gating(params: Any) -> Gating:
    if type(params) not in GATINGS:
        listed = ", ".join(kind.__name__ for kind in GATINGS)
        raise ValueError(f"params is a {type(params).__name__}: it must be one of {listed}")
    return GATINGS[type(params)]


def step(
    params: Any, inputs: ArrayLike, carry: Any, *, dtype: DTypeLike | None = None
) -> tuple[Any, jax.Array]:
    """Run one step of the layer with these parameters, for example to generate a token.

    Inputs are [batch, features], and `carry` is the one before. Return the next carry, and the
    outputs [batch, hidden]. A loop over it is slower than one call over time.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    gating = _get_gating(params)
    inputs = jnp.asarray(inputs)
    if inputs.ndim != 2:
        raise ValueError(f"inputs are {list(inputs.shape)}: they must be [batch, features]")
    arguments = None, None, False, dtype, "scan"
    carry, outputs = _run(gating, params, inputs[:, None], carry, *arguments)
    return carry, outputs[:, 0]


def _run(
    gating: Gating,
    params: Any,
    inputs: ArrayLike,
    carry: Any,
    reset: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: bool,
    dtype: DTypeLike | None,
    implementation: str,
) -> tuple[Any, jax.Array]:
    """Check the arguments, and run a layer."""
    inputs = convert_floats("inputs", inputs, "batch", "time", "features")
    batch, time, features = inputs.shape
    params = convert_params(gating, params, features)
    shape = batch, len(params.recurrent_kernel)
    first = convert_carry(gating.carry, carry, shape, inputs.dtype)
    reset = convert_flags("reset", reset, (batch, time))
    lengths = convert_lengths(lengths, batch)
    wide = jnp.promote_types(jnp.result_type(*jax.tree.leaves((params, inputs, first))), "float32")
    low = "bfloat16" if jnp.dtype(dtype or inputs.dtype) == jnp.bfloat16 else "float32"
    name = choice.choose(
        implementation if time else "scan",
        gating,
        size=shape[1],
        batch=batch,
        dtype=low,
        is_wide=wide != jnp.float32,
        has_reset=reset is not None,
        has_lengths=lengths is not None,
    )
    arrays = params, inputs, first, reset, lengths
    return _compute(gating, _find(name), reverse, wide, low, *arrays)


def _find(name: str) -> Any:
    """Return the function that runs a layer with an implementation."""
    if name == "scan":
        return scan.run
    if name == "cudnn":
        return cudnn.run
    if name == "c":
        return _IN_C
    if name == "pallas":
        from lstm_jax.ops import pallas  # Importing it takes a while.

        return _make_accelerated(name, pallas.LOOPS)
    return _FUSED if jax.default_backend() == "cpu" else _make_accelerated(name, accelerator.LOOPS)


@functools.cache
def _make_accelerated(name: str, loops: accelerator.Loops) -> Any:
    forward = functools.partial(accelerator.forward, loops=loops)
    backward = functools.partial(accelerator.backward, loops=loops)
    functions = forward, backward, accelerator.differentiate_params
    return _bind(name, *functions, batch_axis=1)


def _bind(*arguments: Any, **options: Any) -> Any:
    return functools.partial(recurrence.run, Implementation(*arguments, **options))


_FUSED = _bind("xla", fused.forward, fused.backward, fused.differentiate_params, batch_axis=-1)
_IN_C = _bind(
    "c", in_c.forward, in_c.backward, in_c.differentiate_params, batch_axis=1, is_exportable=False
)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _compute(
    gating: Gating,
    run_layer: Any,
    reverse: bool,
    wide: Any,
    low: str,
    params: Any,
    inputs: jax.Array,
    first: Any,
    reset: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """Run a layer with arrays of the dtype `wide`."""
    steps = turn(inputs, lengths) if reverse else inputs
    if reset is not None and reverse:
        reset = turn(reset, lengths)
    frozen = None if lengths is None else jnp.arange(inputs.shape[1]) >= lengths[:, None]
    if frozen is not None:
        steps = jnp.where(frozen[..., None], 0, steps)  # What is there may not be finite.
        reset = None if reset is None else reset & ~frozen
    marks = Marks(*(None if mark is None else mark.T for mark in (reset, frozen)))
    params, steps, carry = jax.tree.map(
        lambda x: x.astype(wide), (params, steps.swapaxes(0, 1), first)
    )
    last, outputs = run_layer(gating, params, steps, carry, marks, low)
    outputs = outputs.swapaxes(0, 1)
    if frozen is not None:
        outputs = jnp.where(frozen[..., None], 0, outputs)
    outputs = turn(outputs, lengths) if reverse else outputs
    last = jax.tree.map(lambda x, y: x.astype(y.dtype), last, first)
    return last, outputs.astype(inputs.dtype)


def turn(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Return x [batch, time, ...] with the steps, those within each length, in reverse order."""
    if lengths is None:
        return jnp.flip(x, axis=1)
    time = jnp.arange(x.shape[1])
    order = jnp.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
