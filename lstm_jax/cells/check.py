"""Check that a cell follows the protocol: `check_cell`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from lstm_jax.cells.making import describe_place, get_types, make_cell, name_cell_error, trace_cell
from lstm_jax.cells.protocol import get_activation, get_gates, run_cell
from lstm_jax.errors import UserError, make_visible

# Two parts of one length need one compiled program.
_BATCH, _TIME, _CUT = 3, 6, 3
# Differences relative to the largest value.
_SAME, _BFLOAT16 = 1e-5, 5e-2


def check_cell(
    cell: type[nn.Module] | nn.Module,
    input_size: int = 5,
    hidden_size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that a cell follows `lstm_jax.cells.protocol`, with random parameters and inputs.

    Check shapes and dtypes; single steps, and the parallel form, against a scan; a sequence against
    its two parts with the carry kept; that texts of a batch are independent;
    gradients against finite differences, in float64; bfloat16 against float32, if the cell has a
    field dtype; and gates and activations, if it has any.

    Args:
      cell: a class, made with the other arguments, or an unbound module.
      input_size: the number of inputs.
      hidden_size: the number of hidden units.
      options: other fields of the cell.

    Raises:
      UserError: with the name, file and line of the cell, and what failed.
    """
    made: Any = cell
    if not isinstance(cell, nn.Module):
        made = make_cell(cell, input_size, hidden_size, options=options)
    elif not (hasattr(cell, "input_size") and hasattr(cell, "hidden_size")):
        raise UserError(f"{describe_place(type(cell))} needs fields input_size and hidden_size")
    with name_cell_error(type(made)):
        made = made.clone(dtype="float32") if hasattr(made, "dtype") else made
        for batch in (1, _BATCH):
            trace_cell(made, batch)
        variables = _check_values(made)
        with jax.enable_x64(True):
            _check_gradients(made, variables)


def _check_values(cell: Any) -> Any:
    """Check all but gradients; return the parameters that were drawn."""
    rng = np.random.default_rng(0)

    # NumPy's operations need no compilation.
    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    inputs, carry = draw(_BATCH, _TIME, cell.input_size), cell.initial_carry(_BATCH)
    variables = jax.jit(cell.init)(jax.random.key(0), carry, inputs[:, 0])
    variables = jax.tree.map(lambda x: np.asarray(x) + 0.1 * draw(*x.shape), variables)
    scan = _make_run(cell, variables)
    # From the state after another text, in which no part of the carry has its first value.
    carry, _ = scan(carry, draw(_BATCH, _TIME, cell.input_size))

    whole = scan(carry, inputs)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(whole)):
        raise _failure(cell, "__call__", "its outputs or its carry are not finite")
    after, outputs, step = carry, [], jax.jit(cell.apply)
    for t in range(_TIME):
        after, output = step(variables, after, inputs[:, t])
        outputs.append(output)
    steps = after, np.stack(outputs, axis=1)
    _compare(cell, "__call__", "single steps differ from a scan", steps, whole, _SAME)

    for parallel in (False, True) if hasattr(cell, "run_parallel") else (False,):
        method, name = ("run_parallel", "the parallel form") if parallel else ("__call__", "a scan")
        run = _make_run(cell, variables, "auto") if parallel else scan
        if parallel:
            _compare(cell, method, f"{name} differs from a scan", run(carry, inputs), whole, _SAME)
        between, first = run(carry, inputs[:, :_CUT])
        last, second = run(between, inputs[:, _CUT:])
        parts = last, np.concatenate([first, second], axis=1)
        message = f"{name} of two parts, with the carry kept, differs from {name} of the whole"
        _compare(cell, method, message, parts, whole, _SAME)
        one = run(jax.tree.map(lambda x: x[:1], carry), inputs[:1])
        message = f"in {name}, the results of a text depend on the other texts of its batch"
        _compare(cell, method, message, one, jax.tree.map(lambda x: x[:1], whole), _SAME)
        if parallel:
            read = carry, inputs, rng.random((_BATCH, _TIME)) < 0.3
            message = f"with documents, {name} differs from a scan"
            _compare(cell, method, message, run(*read), scan(*read), _SAME)

    if hasattr(cell, "dtype"):
        low = _make_run(cell.clone(dtype="bfloat16"), variables)(carry, inputs)
        _compare(cell, "__call__", "bfloat16 is far from float32", low, whole, _BFLOAT16)

    def inspect(cell: Any, carry: Any, inputs: jax.Array) -> Any:
        after, output = cell(carry, inputs)
        return get_gates(cell, carry, inputs), get_activation(cell, after, output)

    inspected = jax.jit(nn.apply(inspect, cell))(variables, carry, inputs[:, 0])
    gates, activation = jax.device_get(inspected)
    named = [("gates", name, 0, gate) for name, gate in gates.items() if name != "candidate"]
    for method, name, low_end, value in [*named, ("activation", "activation", -1, activation)]:
        if not ((value >= low_end) & (value <= 1)).all():
            raise _failure(cell, method, f"{name} has values outside of [{low_end}, 1]")
    return variables


def _check_gradients(cell: Any, variables: Any) -> None:
    rng = np.random.default_rng(1)

    def to_float64(x: Any) -> Any:
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    inputs = rng.normal(size=(_BATCH, _TIME, cell.input_size))
    carry, variables = jax.tree.map(to_float64, (cell.initial_carry(_BATCH), variables))
    _, outputs = jax.eval_shape(cell.apply, variables, carry, inputs[:, 0])
    if outputs.dtype != jnp.float64:
        raise _failure(
            cell,
            "__call__",
            f"its outputs are {outputs.dtype} for inputs and parameters in float64, so that its "
            "gradients can't be checked: keep the dtype of the inputs",
        )
    for parallel in (False, True) if hasattr(cell, "run_parallel") else (False,):
        method = "run_parallel" if parallel else "__call__"

        def loss(variables: Any, inputs: jax.Array, parallel: bool = parallel) -> jax.Array:
            before = jax.tree.map(jnp.asarray, carry)
            run = nn.apply(run_cell, cell)
            name = "auto" if parallel else "scan"
            after, outputs = run(variables, before, inputs, implementation=name)
            states = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
            weights = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
            return (weights * outputs).sum() + sum(jnp.sin(x).sum() for x in states)

        try:
            check_grads(jax.jit(loss), (variables, inputs), order=1, modes=("rev",), eps=1e-5)
        except AssertionError as error:
            shown = make_visible(str(error))[:300]
            message = f"its gradient differs from finite differences: {shown}"
            raise _failure(cell, method, message) from None


def _make_run(cell: Any, variables: Any, implementation: str = "scan") -> Callable[..., Any]:
    """Return a function of a carry, inputs [batch, time, features] and starts, compiled anew."""
    run = jax.jit(functools.partial(nn.apply(run_cell, cell), implementation=implementation))
    return lambda carry, inputs, starts=None: jax.device_get(
        run(variables, carry, inputs, starts=starts)
    )


def _compare(
    cell: Any, method: str, message: str, actual: Any, expected: Any, tolerance: float
) -> None:
    """Raise an error with this message if two pytrees differ in a shape, dtype or value."""
    if get_types(actual) != get_types(expected):
        raise _failure(cell, method, f"{message} in structure, shapes or dtypes")
    for pair in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # In float64: booleans can't be subtracted, and unsigned integers wrap.
        a, e = (np.asarray(x, np.float64) for x in pair)
        if not a.size:
            continue
        difference, scale = float(abs(a - e).max()), float(abs(e).max())
        if not difference <= tolerance * max(scale, 1):
            raise _failure(
                cell, method, f"{message}: by {difference:.2g}, of values up to {scale:.2g}"
            )


def _failure(cell: Any, method: str, message: str) -> UserError:
    return UserError(f"{describe_place(cell, method)}: {message}")
