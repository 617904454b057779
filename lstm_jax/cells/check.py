"""Check that a cell follows the protocol: `check_cell`."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from lstm_jax.cells import base

# Two parts of one length need one compiled program.
_BATCH, _TIME, _CUT = 3, 6, 3
_FORMS = "scan", "auto"  # A cell without a parallel form has the same program for both.
_TOLERANCE = 1e-5  # Relative to the largest value.


def check_cell(
    cell: type[nn.Module] | nn.Module,
    input_size: int = 5,
    hidden_size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that a cell follows `lstm_jax.cells.base`, with random parameters and inputs.

    Check shapes and dtypes; the parallel form, or the layer of `lstm_jax.ops`, against a scan of
    single steps, whole, with documents and in two parts with the carry kept; that texts of a batch
    are independent; bfloat16 against float32, if it has the field `dtype`; gradients against finite
    differences, in float64; and the range of `activation`.

    `cell` is a class, which is made with the other arguments, of which `options` are further fields
    by name; or an unbound module. Raise `UserError` with the name and file of the cell, and what
    failed.
    """
    module: Any = cell
    if not isinstance(cell, nn.Module):
        module = base.make_cell(cell, input_size, hidden_size, options=options)
    with base.name_cell_error(type(module)):
        module = module.clone(dtype="float32") if hasattr(module, "dtype") else module
        with jax.enable_x64(False):
            variables = _check_values(module)
        with jax.enable_x64(True):
            _check_gradients(module, variables)


def _check_shapes(cell: Any, variables: Any, carry: Any, inputs: np.ndarray) -> None:
    """Check the shapes and dtypes of a step, and the range of its activations.

    A scan checks the shapes and dtypes of the next carry.
    """
    if not all(x.shape[:1] == (_BATCH,) for x in jax.tree.leaves(carry)):
        raise ValueError("the first axis of every array of initial_carry must be the batch")

    def inspect(cell: Any, carry: Any, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry, outputs = cell(carry, inputs)
        return outputs, base.get_activation(cell, carry, outputs)

    results = jax.jit(nn.apply(inspect, cell))(variables, carry, inputs)
    for name, x in zip(("outputs", "activation"), results, strict=True):
        if x.shape != (_BATCH, cell.hidden_size) or not jnp.issubdtype(x.dtype, jnp.floating):
            wanted = f"floats [batch, hidden_size], here {[_BATCH, cell.hidden_size]}"
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}: it must be {wanted}")
    if (abs(results[1]) > 1 + _TOLERANCE).any():
        raise ValueError("activation is not in [-1, 1]")


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
    run = functools.partial(_compile(cell), variables)
    # From the state after another text, in which no part of the carry has its first value.
    carry, _ = run(carry, draw(_BATCH, _TIME, cell.input_size), implementation="scan")
    reset = rng.random((_BATCH, _TIME)) < 0.3
    whole, documents = (run(carry, inputs, mask, implementation="scan") for mask in (None, reset))
    _compare("the parallel form differs from a scan", run(carry, inputs), whole)
    between, first = run(carry, inputs[:, :_CUT], reset[:, :_CUT])
    last, second = run(between, inputs[:, _CUT:], reset[:, _CUT:])
    parts = last, np.concatenate([first, second], axis=1)
    message = "with documents, two parts of the parallel form differ from a scan"
    _compare(message, parts, documents)
    for name in _FORMS if hasattr(cell, "dtype") else ():
        run_low = _compile(cell.clone(dtype="bfloat16"))
        low = run_low(variables, carry, inputs, implementation=name)
        low = jax.tree.map(lambda x, y: x.astype(y.dtype), low, whole)
        message = f"its results in bfloat16 ({name}) differ from those in float32"
        _compare(message, low, whole, tolerance=0.1)
    one, expected = jax.tree.map(lambda x: x[:1], ((carry, inputs), whole))
    message = "the results of a text depend on the other texts of its batch"
    _compare(message, run(*one, implementation="scan"), expected)
    return variables


def _compile(cell: Any) -> Any:
    """Return `run_cell` as a function of the variables and its other arguments."""
    return jax.jit(nn.apply(base.run_cell, cell), static_argnames="implementation")


def _check_gradients(cell: Any, variables: Any) -> None:
    def to_float64(x: Any) -> Any:
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    inputs = np.random.default_rng(1).normal(size=(_BATCH, _TIME, cell.input_size))
    carry, variables = jax.tree.map(to_float64, (cell.initial_carry(_BATCH), variables))
    reset = np.arange(_TIME) == np.full((_BATCH, 1), _CUT)

    def compute(name: str, variables: Any, inputs: jax.Array) -> list[jax.Array]:
        texts = variables, carry, inputs
        results = [_compile(cell)(*texts, mask, implementation=name) for mask in (None, reset)]
        return [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]

    for name in _FORMS:
        run = jax.jit(functools.partial(compute, name))
        try:
            check_grads(run, (variables, inputs), order=1, modes=("rev",), eps=1e-5)
        except AssertionError as error:
            message = f"its gradient ({name}) differs from finite differences"
            raise ValueError(f"{message}: {error}") from None


def _compare(message: str, actual: Any, expected: Any, tolerance: float = _TOLERANCE) -> None:
    """Raise an error with this message if two pytrees differ in a shape, dtype or value."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        atol = tolerance * max(1.0, float(np.abs(np.asarray(e, np.float64)).max(initial=0)))
        options: Any = {"equal_nan": False, "verbose": False, "strict": True}
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=message, **options)
