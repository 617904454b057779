"""The public functions: gated recurrent layers over arrays.

Each checks its arguments and chooses an implementation (`choice.py`); `sequences.py` handles
lengths and direction. `gates.py` has the equations of a step and their derivatives, `xla.py` the
reference implementation and the loops forwards and backwards in time, `in_c.py` and `lstm.c` the
same in C; `vjp.py` makes these differentiable.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer, Shaped

from lstm_jax.matmul import multiply_columns, round_factor
from lstm_jax.ops import choice, in_c, xla
from lstm_jax.ops.gates import (
    GATINGS,
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
    clear,
    expand,
)
from lstm_jax.ops.sequences import (
    Inputs,
    Lengths,
    Outputs,
    Reset,
    check,
    choose_dtypes,
    run_in_order,
)

Name = Literal["auto", "scan", "xla", "c"]
Carry = TypeVar("Carry")
IMPLEMENTATIONS: dict[str, Callable[[Layer], tuple[Any, Array]]] = {
    "scan": xla.scan,
    "xla": xla.run,
    "c": in_c.run,
}


class Options(TypedDict, total=False):
    """The keyword arguments of all gated layers, all optional; `lstm` explains them."""

    reset: Reset  # Steps that read a carry of zeros.
    lengths: Lengths  # Without it, all steps are computed.
    reverse: bool  # By default False.
    dtype: DTypeLike | None  # By default that of the inputs.
    implementation: Name  # By default "auto".


def lstm(
    params: LSTMParams,
    inputs: Inputs,
    carry: LSTMCarry | None = None,
    *,
    reset: Reset = None,
    lengths: Lengths = None,
    reverse: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Name = "auto",
) -> tuple[LSTMCarry, Outputs]:
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
    inputs: Inputs,
    carry: LSTMCarry | None = None,
    **options: Unpack[Options],
) -> tuple[LSTMCarry, Outputs]:
    """Run an LSTM whose gates see the cell state (Gers & Schmidhuber 2000) over time.

        i, f = sigmoid(x W + h U + p * c + b) of the gate, and g = tanh(x W + h U + b)
        c' = f * c + i * g
        o = sigmoid(x W + h U + p * c' + b)
        h' = o * tanh(c')

    Options are `ops.Options`; arguments, results and errors are those of `lstm`.
    """
    return _run(PEEPHOLE_LSTM, params, inputs, carry, **options)


def gru(
    params: GRUParams, inputs: Inputs, carry: HiddenCarry | None = None, **options: Unpack[Options]
) -> tuple[HiddenCarry, Outputs]:
    """Run a gated recurrent unit (Cho et al. 2014), cuDNN's and PyTorch's variant, over time.

        r, z = sigmoid(x W + h U + b) of the gate
        n = tanh(x W + b + r * (h U + un))
        h' = (1 - z) * n + z * h

    Options are `ops.Options`; arguments, results and errors are those of `lstm`. The gates are in
    the order r, z, n.
    """
    return _run(GRU, params, inputs, carry, **options)


def rnn(
    params: RNNParams, inputs: Inputs, carry: HiddenCarry | None = None, **options: Unpack[Options]
) -> tuple[HiddenCarry, Outputs]:
    """Run a simple recurrent network (Elman 1990) over time.

        h' = tanh(x W + h U + b)

    Options are `ops.Options`; arguments, results and errors are those of `lstm`.
    """
    return _run(RNN, params, inputs, carry, **options)


@overload
def run(
    params: LSTMParams | PeepholeLSTMParams,
    inputs: Inputs,
    carry: LSTMCarry | None = None,
    **options: Unpack[Options],
) -> tuple[LSTMCarry, Outputs]: ...
@overload
def run(
    params: GRUParams | RNNParams,
    inputs: Inputs,
    carry: HiddenCarry | None = None,
    **options: Unpack[Options],
) -> tuple[HiddenCarry, Outputs]: ...
def run(
    params: Any, inputs: Inputs, carry: Any = None, **options: Unpack[Options]
) -> tuple[Any, Outputs]:
    """Run the gated layer with these parameters, an instance of `LSTMParams` or another, over time.

    Options are `ops.Options`; arguments, results and errors are those of `lstm`.
    """
    return _run(get_gating(params), params, inputs, carry, **options)


def get_gating(params: Any) -> Gating:
    """Return the recurrence with such parameters; raise ValueError if there is none."""
    if type(params) not in GATINGS:
        names = ", ".join(kind.__name__ for kind in GATINGS)
        raise ValueError(f"params is a {type(params).__name__}: it must be one of {names}")
    return GATINGS[type(params)]


def step(
    params: Any,
    inputs: Float[ArrayLike, "batch features"],
    carry: Carry,
    *,
    reset: Shaped[ArrayLike, " batch"] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Carry, Float[Array, "batch hidden"]]:
    """Run one step of the layer with these parameters, for example to generate a token.

    Inputs are [batch, features], and `carry` is the one before; `reset` [batch] is true where the
    step reads a carry of zeros instead. Return the next carry, and the outputs [batch, hidden]. A
    loop over it is slower than one call over time.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    steps = jnp.expand_dims(jnp.asarray(inputs), axis=1)
    marks = None if reset is None else jnp.expand_dims(jnp.asarray(reset), axis=1)
    options: Any = {"dtype": dtype, "implementation": "scan"}
    last, outputs = _run(get_gating(params), params, steps, carry, marks, **options)
    return last, outputs[:, 0]


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
) -> tuple[Any, Outputs]:
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
    multiplied = low if wide == jnp.float32 else wide.name
    name = implementation if time else "scan"
    name = choice.choose(name, gating, size=hidden, dtype=multiplied)
    axis = int(jax.default_backend() != "cpu")
    return _compute(gating, name, axis, reverse, wide, low, params, inputs, first, reset, lengths)


@functools.partial(jax.jit, static_argnums=range(6))
def _compute(
    gating: Gating, name: str, axis: int, reverse: bool, wide: Any, low: str, *arrays: Any
) -> tuple[Any, Outputs]:
    def run(params: Any, inputs: Array, carry: Any, marks: Marks) -> tuple[Any, Array]:
        inputs, marks = inputs.swapaxes(0, 1), jax.tree.map(jnp.transpose, marks)
        layer = Layer(gating, low, axis, expand(params), inputs, carry, marks)
        last, outputs = IMPLEMENTATIONS[name](layer)
        return last, outputs.swapaxes(0, 1)

    return run_in_order(run, wide, reverse, *arrays)


_static: Any = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedLayer:
    """A gated layer that `prepare` has prepared for single steps."""

    params: Any  # `LSTMParams`, or those of another layer.
    kernel: Array  # [sums, inputs + hidden], rounded; or as the library packs it.
    terms: Array  # [1, sums], the bias; or with one-hot inputs [features, sums], for each input.
    is_one_hot: bool = _static()
    dtype: str = _static()
    runs_in_c: bool = _static()

    def step(
        self,
        inputs: Float[ArrayLike, "batch features"] | Integer[ArrayLike, " batch"],
        carry: Any,
        reset: Shaped[ArrayLike, " batch"] | None = None,
    ) -> tuple[Any, Float[Array, "batch hidden"]]:
        """Run one step; arguments, results and errors are those of `ops.step`.

        If inputs are one-hot, they are integers [batch] below the number of features.
        """
        gating, wide = GATINGS[type(self.params)], self.terms.dtype
        kind: Any = Integer[Array, " batch"] if self.is_one_hot else Float[Array, "batch features"]
        x, _, first, mask = check(
            inputs=(inputs, kind),
            params=(self.params, gating.params),
            carry=(carry, gating.carry),
            reset=(reset, Shaped[Array, " batch"]),
        )
        mask = None if mask is None else mask.astype(bool)
        state = clear(jax.tree.map(lambda x: x.astype(wide), first), mask)
        if self.is_one_hot:
            factors, terms = state.hidden, self.terms[x]
        else:
            factors, terms = jnp.concatenate([x, state.hidden], axis=1), self.terms
        run = _run_in_c if self.runs_in_c else _run_in_xla
        next_carry = run(self, factors, terms, state)
        next_carry = jax.tree.map(lambda x, y: x.astype(y.dtype), next_carry, first)
        return next_carry, next_carry.hidden


def prepare(
    params: Any, *, is_one_hot: bool = False, dtype: DTypeLike | None = None
) -> PreparedLayer:
    """Compute what is the same at all steps of the layer with these parameters.

    `layer.step(inputs, carry)` then is `ops.step(params, inputs, carry)`, but faster. With
    `is_one_hot`, inputs are integers, each the place of the 1. `dtype` is as in `lstm`, by default
    that of the recurrent kernel.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    gating = get_gating(params)
    (params,) = check(params=(params, gating.params))
    low, wide = choose_dtypes(dtype, params.recurrent_kernel, params)
    gated, size = expand(params), len(params.recurrent_kernel)
    kernel, terms = _join_kernels(params, is_one_hot).astype(wide), gated.bias[None]
    if is_one_hot:
        terms = gating.spread(gated.input_kernel, gating.of_inputs) + terms
    runs_in_c = wide == jnp.float32 and choice.runs_in_c("steps", low, size, gating.name)
    if runs_in_c:  # `_run_in_c` is differentiated by the parameters.
        kernel = in_c.pack_gates(gating, jax.lax.stop_gradient(kernel).astype(low))
    else:
        kernel = round_factor(kernel.T, low)
    return PreparedLayer(params, kernel, terms.astype(wide), is_one_hot, low, runs_in_c)


def _join_kernels(params: Any, is_one_hot: bool) -> Array:
    """Return what multiplies the inputs, unless they are one-hot, and the hidden state."""
    gating, gated = GATINGS[type(params)], expand(params)
    kernel = gating.spread(gated.recurrent_kernel, gating.of_hidden)
    if is_one_hot:
        return kernel
    return jnp.concatenate([gating.spread(gated.input_kernel, gating.of_inputs), kernel])


def _run_in_xla(layer: PreparedLayer, factors: Array, terms: Array, carry: Any) -> Any:
    """Return the next carry, computed feature-major.

    The kernel multiplies the factors [batch, depth]. Terms are [batch or 1, sums].
    """
    gating, peepholes = GATINGS[type(layer.params)], expand(layer.params).peepholes
    sums = multiply_columns(layer.kernel, round_factor(factors.T, layer.dtype)) + terms.T
    weights = None if peepholes is None else peepholes[:, :, None]
    state = jax.tree.map(jnp.transpose, carry)
    next_carry, _ = gating.activate(tuple(jnp.split(sums, gating.num_sums)), state, weights)
    return jax.tree.map(jnp.transpose, next_carry)


@jax.custom_jvp
def _run_in_c(layer: PreparedLayer, factors: Array, terms: Array, carry: Any) -> Any:
    gating, peepholes = GATINGS[type(layer.params)], expand(layer.params).peepholes
    return in_c.run_step(gating, layer.kernel, factors, terms, carry, peepholes)


@_run_in_c.defjvp
def _differentiate(primals: Any, tangents: Any) -> Any:
    """Differentiate the same step in XLA, by the parameters."""

    def run(layer: PreparedLayer, *arrays: Any) -> Any:
        kernel = round_factor(_join_kernels(layer.params, layer.is_one_hot).T, layer.dtype)
        return _run_in_xla(dataclasses.replace(layer, kernel=kernel), *arrays)

    return jax.jvp(run, primals, tangents)
