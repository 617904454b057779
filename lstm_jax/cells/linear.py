"""A base for cells with a linear recurrence, whose steps can be computed at once."""

import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.cells.base import HiddenCarry, SizedCell


class LinearCell(SizedCell):
    """A cell with h' = a * h + b, where a and b depend on the inputs only."""

    def coefficients(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return a and b [..., hidden_size] for inputs [..., input_size]."""
        raise NotImplementedError

    def __call__(self, carry: HiddenCarry, inputs: jax.Array) -> tuple[HiddenCarry, jax.Array]:
        """Return the next carry and the outputs, for inputs [batch, input_size]."""
        a, b = self.coefficients(inputs)
        hidden = a * carry.hidden + b
        return HiddenCarry(hidden), hidden

    def run_parallel(
        self, carry: HiddenCarry, inputs: jax.Array, starts: jax.Array | None
    ) -> tuple[HiddenCarry, jax.Array]:
        """Return the last carry and all outputs, for inputs [batch, time, input_size]."""
        a, b = self.coefficients(inputs)
        if starts is not None:
            a = jnp.where(starts[..., None], 0, a)
        # Step by step, a CPU passes over the memory once; other devices compute all steps at once.
        run = scan_linear if jax.default_backend() == "cpu" else compose_linear
        hidden = run(a, b, carry.hidden)
        return HiddenCarry(hidden[:, -1]), hidden


def scan_linear(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Return h_1, ..., h_T for a, b [batch, time, features] and h_0 `first` [batch, features]."""

    def step(hidden: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = ab[0] * hidden + ab[1]
        return hidden, hidden

    _, hidden = lax.scan(step, first, (a.swapaxes(0, 1), b.swapaxes(0, 1)))
    return hidden.swapaxes(0, 1)


def compose_linear(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Compute `scan_linear` with an associative scan (Blelloch 1990), in log2(T) rounds.

    The composition of two steps is a step, (a2 a1, a2 b1 + b2), and composing is associative.
    """

    def compose(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a1, b1), (a2, b2) = earlier, later
        return a2 * a1, a2 * b1 + b2

    decays, hidden = lax.associative_scan(compose, (a, b), axis=1)
    return decays * first[:, None] + hidden
