"""Make cells, and check them against `cells.protocol`; messages name a cell's file and line."""

import contextlib
import dataclasses
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_jax.errors import UserError, one_line

_NOT_OPTIONS = ("input_size", "hidden_size", "dtype", "layer_norm", "parent", "name")
# The methods of the protocol and their arguments; the first two methods are required.
_METHODS = {
    "initial_carry": ("batch_size",),
    "__call__": ("carry", "inputs"),
    "run_parallel": ("carry", "inputs", "starts"),
    "gates": ("carry", "inputs"),
    "activation": ("carry",),
}


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
        raise UserError(f"the cell {cell!r} is not a subclass of flax.linen.Module")
    fields = {field.name: field for field in dataclasses.fields(cell)}
    _check_class(cell, fields)
    given = dict(options or {})
    _check_options(cell, given, fields)
    for name, value, default in (("dtype", dtype, "float32"), ("layer_norm", layer_norm, False)):
        if name in fields:
            given[name] = value
        elif value != default:
            raise UserError(f"the cell {cell.__name__} has no field {name}: it must be {default!r}")
    with name_cell_error(cell):
        return cell(input_size=input_size, hidden_size=hidden_size, parent=None, **given)


def _check_class(cell: type[nn.Module], fields: Mapping[str, Any]) -> None:
    """Raise `UserError` if a class lacks a field or a method, or has one of another form."""
    for name in ("input_size", "hidden_size"):
        if name not in fields:
            raise UserError(f"{describe_place(cell)} has no field {name}: declare it as an int")
    for name, field in fields.items():
        if name not in _NOT_OPTIONS and field.default is dataclasses.MISSING:
            raise UserError(
                f"{describe_place(cell)}: its field {name} needs a default, as all fields but "
                "input_size and hidden_size do"
            )
    for name, arguments in _METHODS.items():
        # Not `hasattr`: every class has a __call__, which makes an instance.
        if not any(name in vars(base) for base in cell.__mro__):
            if name in ("initial_carry", "__call__"):
                raise UserError(f"{describe_place(cell)} has no method {name}: see docs/cells.md")
            continue
        try:
            inspect.signature(getattr(cell, name)).bind(cell, *arguments)
        except TypeError:
            listed = ", ".join(("self", *arguments))
            raise UserError(
                f"{describe_place(cell, name)}: the arguments of {name} must be ({listed})"
            ) from None


def _check_options(
    cell: type[nn.Module], options: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    """Raise `UserError` for an option that a cell does not have, or of another type."""
    known = [name for name in fields if name not in _NOT_OPTIONS]
    for name, value in options.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise UserError(
                f"the cell {cell.__name__} has no option {name}: its options are {listed}"
            )
        default = fields[name].default
        fits = isinstance(value, type(default)) or (type(default), type(value)) == (float, int)
        if default is not None and not fits:
            raise UserError(
                f"the option {name} of the cell {cell.__name__} is {value!r}: it must be of type "
                f"{type(default).__name__}"
            )


def trace_cell(cell: Any, batch: int = 3) -> None:
    """Check the shapes and dtypes of a cell against the protocol, without computing anything.

    Raise `UserError` with the file and line of a mistake.
    """
    kind = type(cell)
    with name_cell_error(kind):
        carry = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, cell.initial_carry(batch)))
    where = f"{describe_place(cell, 'initial_carry')}: initial_carry({batch}) returned"
    if carry is None:
        raise UserError(f"{where} None: it must return arrays [batch_size, ...], or () for none")
    if any(leaf.shape[:1] != (batch,) for leaf in jax.tree.leaves(carry)):
        raise UserError(
            f"{where} {_describe(carry)}: the first axis of every array must be the batch"
        )
    inputs = jax.ShapeDtypeStruct((batch, cell.input_size), jnp.float32)
    with name_cell_error(kind):
        variables = jax.eval_shape(cell.init, jax.random.key(0), carry, inputs)

    def trace(run: Callable[..., Any], inputs: Any = inputs) -> Any:
        with name_cell_error(kind):
            return jax.eval_shape(nn.apply(run, cell), variables, carry, inputs)

    if others := [name for name in variables if name != "params"]:
        raise UserError(
            f"{describe_place(cell, '__call__')}: it has variables in the collection "
            f"{others[0]!r}: return all state in the carry, and declare parameters with self.param"
        )
    _check_step(cell, "__call__", trace(kind.__call__), carry, (batch,))
    if hasattr(cell, "run_parallel"):
        several = jax.ShapeDtypeStruct((batch, 2, cell.input_size), jnp.float32)
        result = trace(lambda cell, *read: cell.run_parallel(*read, None), several)
        _check_step(cell, "run_parallel", result, carry, (batch, 2))
    if hasattr(cell, "gates"):
        where = describe_place(cell, "gates")
        # In one trace with a step, as in `LanguageModel.run_step`.
        gates, _ = trace(lambda cell, *read: (cell.gates(*read), cell(*read)))
        if not isinstance(gates, dict):
            raise UserError(f"{where}: it must return a dict from the names of gates to arrays")
        for name, gate in gates.items():
            _check_outputs(f"{where}: {name} is", gate, (batch, cell.hidden_size))
    if hasattr(cell, "activation"):
        where = f"{describe_place(cell, 'activation')}: activation is"
        activation = trace(lambda cell, *read: cell.activation(cell(*read)[0]))
        _check_outputs(where, activation, (batch, cell.hidden_size))


def _check_step(cell: Any, method: str, result: Any, carry: Any, leading: tuple[int, ...]) -> None:
    """Raise `UserError` unless a method returned a carry like this one, and outputs."""
    where = describe_place(cell, method)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise UserError(f"{where}: it must return a tuple of the next carry and the outputs")
    after, outputs = result
    _check_outputs(f"{where}: its outputs are", outputs, (*leading, cell.hidden_size))
    if get_types(after) != get_types(carry):
        raise UserError(
            f"{where}: the next carry is {_describe(after)}: it must be as in initial_carry, "
            f"{_describe(carry)}"
        )


def get_types(tree: Any) -> tuple[Any, list[Any]]:
    """Return the structure of a pytree, and the shapes and dtypes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _check_outputs(where: str, outputs: Any, shape: tuple[int, ...]) -> None:
    """Raise `UserError` unless this is a floating-point array of this shape."""
    if getattr(outputs, "shape", None) != shape or not jnp.issubdtype(outputs.dtype, jnp.floating):
        axes = "batch, time, hidden_size" if len(shape) == 3 else "batch, hidden_size"
        wanted = f"floats [{axes}], here {list(shape)}"
        raise UserError(f"{where} {_describe(outputs)}: it must return {wanted}")


@contextlib.contextmanager
def name_cell_error(cell: type[nn.Module]) -> Iterator[None]:
    """Raise any exception in the code of a cell as a `UserError` with the line in its file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file, _ = find_source(cell)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        place = describe_place(cell, line=lines[-1] if lines else None)
        # Without the links and the internals of Flax and JAX.
        message, *_ = re.split(r" \(https?:| The error occurred while", one_line(error))
        raise UserError(f"{place}: {message[:400]}") from error


def describe_place(cell: Any, method: str = "", line: int | None = None) -> str:
    """Return the name of a cell with its file and the line of a method, or of the class."""
    kind = cell if isinstance(cell, type) else type(cell)
    file, start = find_source(getattr(kind, method) if method else kind)
    return f"the cell {kind.__name__} ({file}, line {line or start})"


def find_source(thing: Any) -> tuple[str, int]:
    """Return the file and first line of a class or function; "<unknown>", 0 without a source."""
    thing = inspect.unwrap(thing)
    try:
        return str(inspect.getsourcefile(thing)), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):  # Typed in a session, for example.
        return "<unknown>", 0


def _describe(tree: Any) -> str:
    """Return the shapes and dtypes of a pytree, briefly."""
    described = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
    return str(described).replace("'", "")
