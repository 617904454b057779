"""Check that a cell follows the protocol: `check_cell`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from lstm_jax.cells import base
from lstm_jax.errors import UserError, make_visible

# Two parts of one length need one compiled program.
_BATCH, _TIME, _CUT = 3, 6, 3
_TOLERANCE = 1e-5  # Relative to the largest value.


def check_cell(
    cell: type[nn.Module] | nn.Module,
    input_size: int = 5,
    hidden_size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that a cell follows `lstm_jax.cells.base`, with random parameters and inputs.

    Check shapes and dtypes; single steps, and the parallel form, against a scan; a sequence against
    its two parts with the carry kept; that texts of a batch are independent; bfloat16 against
    float32, if it has the field `dtype`; and gradients against finite differences, in float64. Of
    `gates` and `activation`, only the range is checked, because a step may compute anything from
    its gates.

    `cell` is a class, which is made with the other arguments, of which `options` are further fields
    by name; or an unbound module. Raise `UserError` with the name and file of the cell, and what
    failed.
    """
    made: Any = cell
    if not isinstance(cell, nn.Module):
        if not (isinstance(cell, type) and issubclass(cell, nn.Module)):
            raise UserError(f"{cell!r} is no cell: it must be a class of flax.linen.Module")
        made = base.make_cell(cell, input_size, hidden_size, options=options)
    with base.name_cell_error(type(made)):
        made = made.clone(dtype="float32") if hasattr(made, "dtype") else made
        with jax.enable_x64(False):
            variables = _check_values(made)
        with jax.enable_x64(True):
            _check_gradients(made, variables)


def _check_shapes(cell: Any, variables: Any, carry: Any, inputs: np.ndarray) -> None:
    """Check the shapes and dtypes of a step, and the range of its gates and activations.

    A scan checks the shapes and dtypes of the next carry.
    """
    if not all(x.shape[:1] == (_BATCH,) for x in jax.tree.leaves(carry)):
        raise _failure(cell, "the first axis of every array of initial_carry must be the batch")

    def inspect(cell: Any, carry: Any, inputs: jax.Array) -> dict[str, jax.Array]:
        after, outputs = cell(carry, inputs)
        activation = base.get_activation(cell, after, outputs)
        return {**base.get_gates(cell, carry, inputs), "outputs": outputs, "activation": activation}

    named = jax.jit(nn.apply(inspect, cell))(variables, carry, inputs)
    real = -np.inf, np.inf
    ranges = {"outputs": real, "candidate": real, "activation": (-1, 1)}
    for name, x in [("outputs", named["outputs"]), *named.items()]:
        if x.shape != (_BATCH, cell.hidden_size) or not jnp.issubdtype(x.dtype, jnp.floating):
            wanted = f"floats [batch, hidden_size], here {[_BATCH, cell.hidden_size]}"
            raise _failure(cell, f"{name} is {x.dtype}{list(x.shape)}: it must be {wanted}")
        least, most = ranges.get(name, (0, 1))
        if (x < least - _TOLERANCE).any() or (x > most + _TOLERANCE).any():
            raise _failure(cell, f"{name} is not in [{least}, {most}]")


def _check_values(cell: Any) -> Any:
    """Check all but gradients; return the parameters that were drawn."""
    rng = np.random.default_rng(0)

    # NumPy's operations need no compilation.
    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    inputs, carry = draw(_BATCH, _TIME, cell.input_size), cell.initial_carry(_BATCH)
    params = jax.jit(cell.init)(jax.random.key(0), carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + 0.1 * draw(*x.shape), params)
    variables = {"params": params}
    _check_shapes(cell, variables, carry, inputs[:, 0])
    scan = _make_run(cell, variables, "scan")
    # From the state after another text, in which no part of the carry has its first value.
    carry, _ = scan(carry, draw(_BATCH, _TIME, cell.input_size))

    whole = scan(carry, inputs)
    after, outputs, step = carry, [], jax.jit(cell.apply)
    for t in range(_TIME):
        after, output = step(variables, after, inputs[:, t])
        outputs.append(output)
    steps = after, np.stack(outputs, axis=1)
    _compare(cell, "single steps differ from a scan", steps, whole)

    between, first = scan(carry, inputs[:, :_CUT])
    last, second = scan(between, inputs[:, _CUT:])
    parts = last, np.concatenate([first, second], axis=1)
    _compare(cell, "two parts, with the carry kept, differ from the whole sequence", parts, whole)
    one = scan(*jax.tree.map(lambda x: x[:1], (carry, inputs)))
    message = "the results of a text depend on the other texts of its batch"
    _compare(cell, message, one, jax.tree.map(lambda x: x[:1], whole))
    if hasattr(cell, "run_parallel"):
        run = _make_run(cell, variables, "auto")
        _compare(cell, "the parallel form differs from a scan", run(carry, inputs), whole)
        documents = carry, inputs, rng.random((_BATCH, _TIME)) < 0.3
        message = "with documents, the parallel form differs from a scan"
        _compare(cell, message, run(*documents), scan(*documents))
    forms = ("scan", "auto") if hasattr(cell, "run_parallel") else ("scan",)
    for name in forms if hasattr(cell, "dtype") else ():
        low = _make_run(cell.clone(dtype="bfloat16"), variables, name)(carry, inputs)
        low = jax.tree.map(lambda x, y: x.astype(y.dtype), low, whole)
        message = f"its results in bfloat16 differ from those in float32 ({name})"
        _compare(cell, message, low, whole, tolerance=0.1)
    return variables


def _check_gradients(cell: Any, variables: Any) -> None:
    def to_float64(x: Any) -> Any:
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    inputs = np.random.default_rng(1).normal(size=(_BATCH, _TIME, cell.input_size))
    carry, variables = jax.tree.map(to_float64, (cell.initial_carry(_BATCH), variables))

    def loss(variables: Any, inputs: jax.Array, reset: Any, implementation: str) -> jax.Array:
        before, reset = jax.tree.map(jnp.asarray, (carry, reset))
        run = nn.apply(base.run_cell, cell)
        after, outputs = run(variables, before, inputs, reset, implementation)
        states = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
        weights = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return (weights * outputs).sum() + sum(jnp.sin(x).sum() for x in states)

    reset = np.arange(_TIME) == np.full((_BATCH, 1), _CUT)
    forms = ("scan", None), ("auto", None), ("auto with documents", reset)
    for name, mask in forms if hasattr(cell, "run_parallel") else forms[:1]:
        run = jax.jit(functools.partial(loss, reset=mask, implementation=name[:4]))
        try:
            check_grads(run, (variables, inputs), order=1, modes=("rev",), eps=1e-5)
        except AssertionError as error:
            shown = make_visible(str(error))[:300]
            message = f"its gradient differs from finite differences ({name}): {shown}"
            raise _failure(cell, message) from None


def _make_run(cell: Any, variables: Any, implementation: str) -> Callable[..., Any]:
    """Return a function of a carry, inputs [batch, time, features] and reset, compiled anew."""
    run = jax.jit(functools.partial(nn.apply(base.run_cell, cell), implementation=implementation))
    return lambda carry, inputs, reset=None: jax.device_get(
        run(variables, carry, inputs, reset=reset)
    )


def _compare(
    cell: Any, message: str, actual: Any, expected: Any, tolerance: float = _TOLERANCE
) -> None:
    """Raise an error with this message if two pytrees differ in a shape, dtype or value."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            raise _failure(cell, f"{message} in shapes or dtypes")
        # In float64: booleans can't be subtracted, and unsigned integers wrap.
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        difference, scale = (float(abs(x).max(initial=0)) for x in (a - e, e))
        if not difference <= tolerance * max(scale, 1):
            raise _failure(cell, f"{message}: by {difference:.2g}, of values up to {scale:.2g}")


def _failure(cell: Any, message: str) -> UserError:
    return UserError(f"{base.describe_cell(type(cell))}: {message}")
