"""The protocol of a cell, the functions by which the model makes and calls one, and base classes.

A cell is a flax module with the fields `input_size` and `hidden_size`, and the methods
`initial_carry(batch_size)`, a pytree of arrays [batch_size, ...] that depends on the fields alone,
and `__call__(carry, inputs)`, which returns the next carry, of the same types, and the outputs. It
may also have a field `dtype`; other fields with a default, which are options; and the methods

- `run_parallel(carry, inputs, reset)`, which returns the last carry and the outputs of all steps.
  `reset` is true at the steps that read the initial carry because a document begins, or None;
- `activation(carry)`, the activations of the hidden units in [-1, 1], for `lstm_jax.export`.

The base classes are optional. Their gates are side by side in `input_kernel` [in, gates *
hidden_size], `recurrent_kernel` [hidden_size, gates * hidden_size] and `bias` [gates *
hidden_size].
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from lstm_jax import ops
from lstm_jax.errors import UserError, check_type, one_line
from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import HiddenCarry

# Of one step, [batch, n], or of all steps, [batch, time, n].
Inputs = Float[Array, "batch *time inputs"]
Outputs = Float[Array, "batch *time hidden"]
Reset = Bool[Array, "batch time"]


def make_cell(
    cell: type[nn.Module],
    input_size: int,
    hidden_size: int,
    dtype: str = "float32",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Make a cell with these sizes and options; raise `UserError` if that fails."""
    types = {field.name: field.type for field in dataclasses.fields(cell)}
    fields = dict(options or {})
    names = types.keys() - {"input_size", "hidden_size", "dtype", "parent", "name"}
    for name, value in fields.items():
        if name not in names:
            choices = ", ".join(sorted(names)) or "none"
            raise UserError(f"the cell {cell.__name__} has no option {name}: choose from {choices}")
        if isinstance(kind := types[name], type):
            check_type(f"config.model.options.{name}", value, kind)
    if "dtype" in types:
        fields["dtype"] = dtype
    elif dtype != "float32":
        raise UserError(
            f"the cell {cell.__name__} has no field dtype: it needs --config.model.dtype=float32"
        )
    with name_cell_error(cell):
        return cell(input_size=input_size, hidden_size=hidden_size, parent=None, **fields)


@contextlib.contextmanager
def name_cell_error(cell: type[nn.Module]) -> Iterator[None]:
    """Raise any exception as a `UserError` with the name of this cell, and its file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A cell that was typed in a session has a module, but no file.
        file = getattr(sys.modules.get(cell.__module__), "__file__", cell.__module__)
        message = f"the cell {cell.__name__} ({file}): {one_line(error)[:400]}"
        raise UserError(message) from error


def run_cell(
    cell: Any,
    carry: Any,
    inputs: Float[ArrayLike, "batch time features"],
    reset: Bool[ArrayLike, "batch time"] | None = None,
    implementation: str = "auto",
) -> tuple[Any, Outputs]:
    """Run a cell over inputs; return the last carry and all outputs.

    With `implementation` "scan", a scan over time; otherwise the one of `lstm_jax.ops` for a cell
    that has parameters for it, the parallel form of a cell that has one, or else a scan. Steps
    where `reset` is true read the initial carry. `LanguageModel.run` and `prepare_step` call
    `lstm_jax.ops` themselves for a first layer that can be folded into the embedding, and for
    single steps in generation.
    """
    if implementation != "scan" and (params := make_ops_params(cell)):
        options: Any = {"dtype": cell.dtype, "implementation": implementation}
        return ops.run(params, inputs, carry, reset=reset, **options)
    if implementation != "scan" and hasattr(cell, "run_parallel"):
        return cell.run_parallel(carry, inputs, reset)
    return _scan(cell, carry, (inputs, reset))


def make_ops_params(cell: Any) -> Any:
    """Return the parameters of a cell as `lstm_jax.ops` takes them; None if it can't run it."""
    if "layer_params" not in vars(type(cell)):
        return None
    return cell.layer_params(*(getattr(cell, name) for name in cell.layer_params._fields))


def reset_carry(cell: Any, carry: Any, reset: Bool[Array, " batch"] | None) -> Any:
    """Return the carry of a cell or model: the initial one where `reset` is true."""
    if reset is None:
        return carry
    return jax.tree.map(
        lambda first, x: jnp.where(reset.reshape(-1, *[1] * (x.ndim - 1)), first, x),
        cell.initial_carry(len(reset)),
        carry,
    )


_scan = nn.scan(
    lambda cell, carry, xs: cell(reset_carry(cell, carry, xs[1]), xs[0]),
    variable_broadcast="params",
    split_rngs={"params": False},
    in_axes=1,
    out_axes=1,
)


def get_activation(cell: Any, carry: Any, outputs: Outputs) -> Outputs:
    """Return the activations after a step; without the method, the tanh of its outputs."""
    has_activation = hasattr(type(cell), "activation")  # `setup` may set an attribute.
    return cell.activation(carry) if has_activation else jnp.tanh(outputs)


class Cell(nn.Module):
    """The fields of most cells, their parameters, and the first carry of one without a cell state.

    The protocol does not require this base class.
    """

    input_size: int  # Features of the inputs.
    hidden_size: int  # The number of hidden units.
    dtype: str = "float32"  # The dtype of matmul operands, "float32" or "bfloat16".
    # The type of the parameters with which `lstm_jax.ops` computes the same, faster. It does so for
    # a class that sets it itself, because a subclass may have other equations.
    layer_params: ClassVar[Any]

    def initial_carry(self, batch_size: int) -> Any:
        """Return the carry at the start of a text: zeros."""
        return HiddenCarry.zeros(batch_size, self.hidden_size, float)

    def declare_kernels(
        self, gates: int, bias: Initializer = nn.initializers.zeros, is_recurrent: bool = True
    ) -> None:
        """Declare the kernels and the bias of this number of gates; call it in `setup`."""
        size, glorot = gates * self.hidden_size, nn.initializers.glorot_uniform()
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        if is_recurrent:
            orthogonal, shape = nn.initializers.orthogonal(), (self.hidden_size, size)
            self.recurrent_kernel = self.param("recurrent_kernel", orthogonal, shape)
        self.bias = self.param("bias", bias, (size,))

    def project_inputs(self, inputs: Array) -> Array:
        """Return x W + b of one or all steps, [..., gates * hidden_size]."""
        return matmul(inputs, self.input_kernel, self.dtype, self.bias)

    def project_hidden(self, hidden: Outputs) -> Float[Array, "batch sums"]:
        """Return h U: [batch, gates * hidden_size], for gates that all read the same state."""
        return matmul(hidden, self.recurrent_kernel, self.dtype)


class LinearCell(Cell):
    """A cell with h' = a * h + b, where a and b depend on the inputs only."""

    def coefficients(self, inputs: Inputs) -> tuple[Outputs, Outputs]:
        """Return a and b of one or all steps."""
        raise NotImplementedError

    def __call__(self, carry: HiddenCarry, inputs: Inputs) -> tuple[HiddenCarry, Outputs]:
        a, b = self.coefficients(inputs)
        hidden = a * carry.hidden + b
        return HiddenCarry(hidden), hidden

    def run_parallel(
        self, carry: HiddenCarry, inputs: Inputs, reset: Reset | None
    ) -> tuple[HiddenCarry, Outputs]:
        return ops.linear_scan(*self.coefficients(inputs), carry, reset=reset)


def forget_bias(gates: int, opened: float | Array) -> Initializer:
    """Return an initializer of the biases of gates, the second of which is a forget gate.

    Its biases are `opened`, one number or one for each hidden unit, so that it remembers at first.
    All others are 0.
    """

    def initialize(key: Array, shape: tuple[int], dtype: DTypeLike = jnp.float32) -> Array:
        biases = jnp.zeros((gates, shape[0] // gates), dtype)
        return biases.at[1].set(jnp.asarray(opened, dtype)).reshape(shape)

    return initialize
