"""Linear recurrences h_t = a_t * h_(t-1) + b_t, of which all steps can be computed at once."""

import jax
from jax import lax


def run_linear(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Return h_1, ..., h_T for a and b [batch, time, features] and h_0 `first` [batch, features].

    The composition of two steps is a step, (a2 a1, a2 b1 + b2), and composing is associative: a
    tree of compositions computes all steps in log2(T) rounds (Blelloch 1990), for T log2(T) work.
    """

    def compose(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a1, b1), (a2, b2) = earlier, later
        return a2 * a1, a2 * b1 + b2

    decays, hidden = lax.associative_scan(compose, (a, b), axis=1)
    return decays * first[:, None] + hidden
