"""The protocol of a cell, and the functions by which the model calls one.

A cell is a flax module with the fields `input_size` and `hidden_size` and two methods:

- `initial_carry(batch_size)` returns the carry at the start of a text, any pytree of arrays
  [batch_size, ...]; it depends on the fields alone, not on parameters;
- `__call__(carry, inputs)` returns the next carry, of the same structure, shapes and dtypes, and
  the outputs.

It may also have

- a field `dtype`, "float32" or "bfloat16", for its matmuls; a field `layer_norm`; and any other
  field with a default, which is an option: `--config.model.options.NAME=VALUE`;
- `run_parallel(carry, inputs, starts)`, which returns the last carry and the outputs of all steps.
  `starts` is true at the steps that read the initial carry because a document begins, or None;
- `gates(carry, inputs)`, which returns the gates of a step by name, and `activation(carry)`, the
  activations of the hidden units in [-1, 1], for `lstm_jax.export`.

Recurrent dropout (DropConnect) applies to every parameter named `recurrent_kernel`. `cells.making`
makes a cell, with errors for a class that does not follow the protocol.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from lstm_jax import ops

# The inputs and outputs of one step, and of all steps.
Inputs = Float[Array, "batch inputs"]
Outputs = Float[Array, "batch hidden"]
AllInputs = Float[Array, "batch time inputs"]
AllOutputs = Float[Array, "batch time hidden"]
Starts = Bool[Array, "batch time"]
# Values of one step by name: gates in [0, 1], and the "candidate", which is not a gate.
Gates = dict[str, Float[Array, "*batch hidden"]]


def run_cell(
    cell: Any,
    carry: Any,
    inputs: Float[ArrayLike, "batch time features"],
    starts: Bool[ArrayLike, "batch time"] | None = None,
    implementation: str = "auto",
) -> tuple[Any, AllOutputs]:
    """Run a cell over inputs; return the last carry and all outputs.

    With `implementation` "scan", a scan over time; otherwise the one of `lstm_jax.ops` for a cell
    that has parameters for it, the parallel form of a cell that has one, or else a scan. Steps
    where `starts` is true read the initial carry.
    """
    if implementation == "scan":
        return _scan(cell, carry, (inputs, starts))
    if params := get_layer_params(cell):
        return run_layer(params, cell.dtype, carry, inputs, starts, implementation)
    if hasattr(cell, "run_parallel"):
        return cell.run_parallel(carry, inputs, starts)
    return _scan(cell, carry, (inputs, starts))


def run_layer(
    params: Any,
    dtype: str,
    carry: Any,
    inputs: Float[ArrayLike, "batch time features"],
    starts: Bool[ArrayLike, "batch time"] | None,
    implementation: str,
) -> tuple[Any, AllOutputs]:
    """Run a gated layer with parameters of `lstm_jax.ops`, as `run_cell` runs a cell."""
    name: Any = "auto" if implementation == "parallel" else implementation
    return ops.run(params, inputs, carry, reset=starts, dtype=dtype, implementation=name)


def has_layer_params(kind: type[nn.Module], layer_norm: bool) -> bool:
    """Return whether `lstm_jax.ops` computes the equations of a cell."""
    # An attribute of the class itself: a subclass may have other equations.
    return "layer_params" in vars(kind) and not layer_norm


def get_layer_params(cell: Any) -> Any:
    """Return the parameters of a cell that `lstm_jax.ops` can run; None for another one."""
    if not has_layer_params(type(cell), getattr(cell, "layer_norm", False)):
        return None
    return cell.layer_params(*(getattr(cell, name) for name in cell.layer_params._fields))


def restart(cell: Any, carry: Any, starts: Bool[Array, " batch"] | None) -> Any:
    """Return the carry of a cell or model: the initial one where `starts` is true."""
    if starts is None:
        return carry
    return jax.tree.map(
        lambda first, x: jnp.where(starts.reshape(-1, *[1] * (x.ndim - 1)), first, x),
        cell.initial_carry(len(starts)),
        carry,
    )


_scan = nn.scan(
    lambda cell, carry, read: cell(restart(cell, carry, read[1]), read[0]),
    variable_broadcast="params",
    split_rngs={"params": False},
    in_axes=1,
    out_axes=1,
)


def get_gates(cell: Any, carry: Any, inputs: Float[ArrayLike, "batch inputs"]) -> Gates:
    """Return the gates of a step; none for a cell without the method."""
    return cell.gates(carry, inputs) if hasattr(type(cell), "gates") else {}


def get_activation(cell: Any, carry: Any, outputs: Outputs) -> Outputs:
    """Return the activations after a step; without the method, the tanh of its outputs."""
    has_activation = hasattr(type(cell), "activation")  # `setup` may set an attribute.
    return cell.activation(carry) if has_activation else jnp.tanh(outputs)
