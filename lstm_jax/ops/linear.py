"""Linear recurrences, h' = a * h + b, whose steps can be computed at once."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lstm_jax.ops.arguments import convert_carry, convert_flags, convert_floats, convert_lengths
from lstm_jax.ops.gates import HiddenCarry
from lstm_jax.ops.layer import turn


def linear_scan(
    decays: ArrayLike,
    terms: ArrayLike,
    carry: HiddenCarry | None = None,
    *,
    reset: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    implementation: Literal["auto", "scan", "parallel"] = "auto",
) -> tuple[HiddenCarry, jax.Array]:
    """Compute h' = a * h + b over time, as in minGRU, minLSTM, RG-LRU and other state space models.

    Args:
      decays: a, floats [batch, time, features].
      terms: b, of the same shape.
      carry: h before the first step that is computed; zeros without one.
      reset: [batch, time], true or not 0 at the steps that read a carry of zeros.
      lengths: integers [batch]. Later steps leave the carry as it is, and their outputs are zero.
      reverse: whether to run from the last step (of each length) to the first.
      implementation: "scan", step by step; "parallel", an associative scan in log2(time) rounds
        (Blelloch 1990); "auto", the first on CPUs, which then pass over the memory once, and the
        second elsewhere.

    Returns:
      The last carry, and h of all steps, [batch, time, features].

    Raises:
      ValueError: if a shape or dtype does not fit.
    """
    a = convert_floats("decays", decays, "batch", "time", "features")
    b = convert_floats("terms", terms, "batch", "time", "features")
    if a.shape != b.shape:
        raise ValueError(f"decays have the shape {a.shape}, and terms {b.shape}: make them equal")
    if implementation not in ("auto", "scan", "parallel"):
        raise ValueError(f"implementation is {implementation!r}: choose auto, scan or parallel")
    batch, time, features = a.shape
    first = convert_carry(HiddenCarry, carry, (batch, features), b.dtype)
    reset = convert_flags("reset", reset, (batch, time))
    lengths = convert_lengths(lengths, batch)
    if reset is not None:
        a = jnp.where(reset[..., None], 0, a)
    frozen = None
    if lengths is not None:
        frozen = jnp.arange(time)[:, None] >= lengths[:, None, None]
        a, b = jnp.where(frozen, 1, a), jnp.where(frozen, 0, b)
    if reverse:
        a, b = turn(a, lengths), turn(b, lengths)
    if not time:
        return first, b
    is_scan = implementation == "scan"
    if implementation == "auto":
        is_scan = jax.default_backend() == "cpu"
    outputs = (_scan if is_scan else _compose)(a, b, first.hidden)
    last = HiddenCarry(outputs[:, -1].astype(first.hidden.dtype))
    outputs = turn(outputs, lengths) if reverse else outputs
    return last, outputs if frozen is None else jnp.where(frozen, 0, outputs)


def _scan(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    def step(hidden: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = ab[0] * hidden + ab[1]
        return hidden, hidden

    first = first.astype(jnp.result_type(a, b, first))
    _, hidden = lax.scan(step, first, (a.swapaxes(0, 1), b.swapaxes(0, 1)))
    return hidden.swapaxes(0, 1)


def _compose(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Compute `_scan` by composing steps.

    The composition of two steps is a step, (a2 a1, a2 b1 + b2), and composing is associative.
    """

    def compose(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a1, b1), (a2, b2) = earlier, later
        return a2 * a1, a2 * b1 + b2

    decays, hidden = lax.associative_scan(compose, (a, b), axis=1)
    return decays * first[:, None] + hidden
