"""Linear recurrences, h' = a * h + b, whose steps can be computed at once."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, Shaped

from lstm_jax.ops.gates import HiddenCarry, Marks, align, clear
from lstm_jax.ops.sequences import (
    Inputs,
    Lengths,
    Outputs,
    Reset,
    check,
    choose_dtypes,
    run_in_order,
)


def linear_scan(
    decays: Inputs,
    terms: Inputs,
    carry: HiddenCarry | None = None,
    *,
    reset: Reset = None,
    lengths: Lengths = None,
    reverse: bool = False,
    implementation: Literal["auto", "scan", "parallel"] = "auto",
) -> tuple[HiddenCarry, Outputs]:
    """Compute h' = a * h + b over time, as in minGRU, minLSTM, RG-LRU and state space models.

    Args:
      decays: a, floats [batch, time, features].
      terms: b, of the same shape.
      carry: h before the first step that is computed; zeros without one.
      reset: as in `lstm`, and so are `lengths` and `reverse`.
      lengths: integers [batch].
      reverse: whether to run from the last step to the first.
      implementation: "scan", step by step; "parallel", an associative scan in log2(time) rounds
        (Blelloch 1990); "auto", "scan" on CPUs, where it reads the memory once, and "parallel"
        elsewhere.

    Returns:
      The last carry, and h of all steps, [batch, time, features], in the dtypes that `lstm` has.

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    a, b, first, reset, lengths = check(
        decays=(decays, Float[Array, "batch time hidden"]),
        terms=(terms, Float[Array, "batch time hidden"]),
        carry=(carry, HiddenCarry),
        reset=(reset, Shaped[Array, "batch time"]),
        lengths=(lengths, Integer[Array, " batch"]),
    )
    (batch, time, features), (_, wide) = a.shape, choose_dtypes(None, a, b, first)
    if first is None:
        first = HiddenCarry.zeros(batch, features, wide)
    if implementation not in ("auto", "scan", "parallel"):
        raise ValueError(f"implementation is {implementation!r}: choose auto, scan or parallel")
    if not time:
        return first, b.astype(jnp.result_type(a, b))
    choice = "scan" if jax.default_backend() == "cpu" else "parallel"
    is_scan = (choice if implementation == "auto" else implementation) == "scan"

    def run(_: tuple[()], inputs: Any, first: Any, marks: Marks) -> tuple[HiddenCarry, Array]:
        (a, b), (before,), marks = align((inputs, first, marks))
        if marks.reset is not None:
            a = jnp.where(marks.reset[..., None], 0, a)
        if marks.frozen is not None:
            a = jnp.where(marks.frozen[..., None], 1, a)
        outputs = (_scan if is_scan else _compose)(a, b, before, marks.reset)
        return HiddenCarry(outputs[:, -1]), outputs

    return run_in_order(run, wide, reverse, (), (a, b), first, reset, lengths)


def _scan(a: Array, b: Array, first: Array, reset: Array | None) -> Array:
    def step(hidden: Array, read: tuple[Any, ...]) -> tuple[Array, Array]:
        a, b, mark = read
        hidden = a * clear(hidden, mark) + b
        return hidden, hidden

    _, hidden = lax.scan(step, first, jax.tree.map(lambda x: x.swapaxes(0, 1), (a, b, reset)))
    return hidden.swapaxes(0, 1)


def _compose(a: Array, b: Array, first: Array, reset: Array | None) -> Array:
    """Compute `_scan` by composing steps.

    The composition of two steps is a step, (a2 a1, a2 b1 + b2), and composing is associative. After
    a reset, a1 and b1 are cleared: they may not be finite.
    """

    def compose(earlier: tuple[Any, ...], later: tuple[Any, ...]) -> tuple[Any, ...]:
        a2, b2, was_reset = later
        a1, b1 = clear(earlier[:2], was_reset)
        return a2 * a1, a2 * b1 + b2, jax.tree.map(jnp.logical_or, earlier[2], was_reset)

    decays, hidden, was_reset = lax.associative_scan(compose, (a, b, reset), axis=1)
    return decays * clear(first[:, None], was_reset) + hidden
