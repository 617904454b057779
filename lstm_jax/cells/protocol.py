"""The protocol of a cell, and the functions by which the model calls one.

A cell is a flax module with the fields `input_size` and `hidden_size` and two methods:

- `initial_carry(batch_size)` returns the carry at the start of a text, any pytree of arrays
  [batch_size, ...]; it depends on the fields alone, not on parameters;
- `__call__(carry, inputs)`, for inputs [batch, input_size], returns the next carry, of the same
  structure, shapes and dtypes, and the outputs [batch, hidden_size].

It may also have

- a field `dtype`, "float32" or "bfloat16", for its matmuls; a field `layer_norm`; and any other
  field with a default, which is an option: `--config.model.options.NAME=VALUE`;
- `run_parallel(carry, inputs)`, which returns the carry after inputs [batch, time, input_size] and
  the outputs [batch, time, hidden_size] of all steps;
- `gates(carry, inputs)`, which returns the gates of a step by name, [batch, hidden_size] each, and
  `activation(carry)`, the activations of the hidden units, [batch, hidden_size] in [-1, 1], for
  `lstm_jax.inspect`.

Recurrent dropout (DropConnect) applies to every parameter named `recurrent_kernel`.
"""

import contextlib
import dataclasses
import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_jax.errors import UserError, one_line

# Values of one step by name, [batch, hidden_size] each: gates in [0, 1], and the "candidate", which
# is not a gate.
Gates = dict[str, jax.Array]

_FIELDS = ("input_size", "hidden_size")
_METHODS = ("initial_carry", "__call__")


def make_cell(
    cell: type[nn.Module],
    input_size: int,
    hidden_size: int,
    dtype: str = "float32",
    layer_norm: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Make a cell with these sizes and options.

    Raises:
      UserError: if it lacks a field or method of the protocol, or an option.
    """
    if not (isinstance(cell, type) and issubclass(cell, nn.Module)):
        raise UserError(f"the cell {cell!r} is not a class of flax modules (flax.linen.Module)")
    fields = {field.name: field.default for field in dataclasses.fields(cell)}
    if missing := [name for name in _FIELDS if name not in fields]:
        raise UserError(f"{describe_place(cell)} has no field {missing[0]}: it must be an int")
    if missing := [name for name in _METHODS if not callable(getattr(cell, name, None))]:
        raise UserError(f"{describe_place(cell)} has no method {missing[0]}: see docs/cells.md")
    given: dict[str, Any] = {}
    for name, value, default in (
        ("dtype", dtype, "float32"),
        ("layer_norm", layer_norm, False),
    ):
        if name in fields:
            given[name] = value
        elif value != default:
            raise UserError(f"the cell {cell.__name__} has no field {name}: leave it {default!r}")
    own = list_options(cell)
    for name, value in (options or {}).items():
        if name not in own:
            known = ", ".join(own) or "none"
            raise UserError(
                f"the cell {cell.__name__} has no option {name}: its options are {known}"
            )
        kinds = (int, float) if isinstance(own[name], float) else type(own[name])
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(own[name], bool):
            raise UserError(
                f"the option {name} of the cell {cell.__name__} is {value!r}: it must be of type "
                f"{type(own[name]).__name__}"
            )
        given[name] = value
    with blaming(cell):
        return cell(input_size=input_size, hidden_size=hidden_size, parent=None, **given)


def list_options(cell: type[nn.Module]) -> dict[str, Any]:
    """Return the options of a cell by name, with their defaults."""
    others = (*_FIELDS, "dtype", "layer_norm", "parent", "name")
    fields = [field for field in dataclasses.fields(cell) if field.name not in others]
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def run_cell(
    cell: Any, carry: Any, inputs: jax.Array, parallel: bool = False
) -> tuple[Any, jax.Array]:
    """Run a cell over inputs [batch, time, features]; return the last carry and all outputs.

    If `parallel`, use the parallel form of a cell that has one, otherwise a scan over time.
    """
    if parallel and hasattr(cell, "run_parallel"):
        after: tuple[Any, jax.Array] = cell.run_parallel(carry, inputs)
        return after
    return _scan(cell, carry, inputs)


_scan = nn.scan(
    lambda cell, carry, inputs: cell(carry, inputs),
    variable_broadcast="params",
    split_rngs={"params": False},
    in_axes=1,
    out_axes=1,
)


def get_gates(cell: Any, carry: Any, inputs: jax.Array) -> Gates:
    """Return the gates of a step; none for a cell without the method."""
    gates: Gates = cell.gates(carry, inputs) if hasattr(cell, "gates") else {}
    return gates


def get_activation(cell: Any, carry: Any, outputs: jax.Array) -> jax.Array:
    """Return the activations after a step; without the method, the tanh of its outputs."""
    return cell.activation(carry) if hasattr(cell, "activation") else jnp.tanh(outputs)


def trace_cell(cell: Any, batch: int = 3) -> Any:
    """Hold the shapes and dtypes of a cell to the protocol, without computing anything.

    Return its parameters as `jax.ShapeDtypeStruct`s. Raise `UserError` with the file and line of a
    mistake.
    """
    with blaming(type(cell)):
        carry = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, cell.initial_carry(batch)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if leaf.shape[:1] != (batch,):
            raise UserError(
                f"{describe_place(cell, 'initial_carry')}: initial_carry({batch}) returned "
                f"{_describe(leaf)}{_at(path)}: the first axis of every array must be the batch"
            )
    inputs = jax.ShapeDtypeStruct((batch, cell.input_size), jnp.float32)
    with blaming(type(cell)):
        variables = jax.eval_shape(cell.init, jax.random.key(0), carry, inputs)
        result = jax.eval_shape(cell.apply, variables, carry, inputs)
    where = describe_place(cell, "__call__")
    if others := [name for name in variables if name != "params"]:
        raise UserError(
            f"{where}: it has variables in the collection {others[0]!r}: return all state in the "
            "carry, and declare parameters with self.param"
        )
    if not (isinstance(result, tuple) and len(result) == 2):
        raise UserError(f"{where}: it must return a tuple of the next carry and the outputs")
    after, outputs = result
    wanted = (batch, cell.hidden_size)
    if getattr(outputs, "shape", None) != wanted:
        raise UserError(
            f"{where}: its outputs are {_describe(outputs)}: they must be [batch, hidden_size], "
            f"here {list(wanted)}"
        )
    structures: list[Any] = [jax.tree.structure(tree) for tree in (after, carry)]
    if structures[0] != structures[1]:
        raise UserError(
            f"{where}: it returned a carry {_describe(after)}: it must have the structure of "
            f"initial_carry, {_describe(carry)}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(carry), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"{where}: the next carry is {_describe(new)}{_at(path)}: it must be as in "
                f"initial_carry, {_describe(old)}"
            )
    return variables.get("params", {})


@contextlib.contextmanager
def blaming(cell: type[nn.Module]) -> Iterator[None]:
    """Convert any exception to a `UserError` with the line in the file of a cell."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file, _ = find_source(cell)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        raise UserError(
            f"{describe_place(cell, line=lines[-1] if lines else None)}: {one_line(error)[:400]}"
        ) from error


def describe_place(cell: Any, method: str = "", line: int | None = None) -> str:
    """Return the name of a cell with its file and the line of a method, or of the class."""
    kind = cell if isinstance(cell, type) else type(cell)
    file, start = find_source(getattr(kind, method) if method else kind)
    return f"the cell {kind.__name__} ({file}, line {line or start})"


def find_source(thing: Any) -> tuple[str, int]:
    """Return the file and the first line of a class or function, as well as they are known."""
    thing = inspect.unwrap(thing)
    try:
        return str(inspect.getsourcefile(thing)), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):  # Typed in a session, for example.
        return "<unknown>", 0


def _describe(tree: Any) -> str:
    """Return the shapes and dtypes of a pytree, briefly."""
    described = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
    return str(described).replace("'", "")


def _at(path: Any) -> str:
    return f" at {jax.tree_util.keystr(path)}" if path else ""
