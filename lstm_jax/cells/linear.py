"""A base for cells with a linear recurrence, whose steps can be computed at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.cells.base import HiddenCarry


class LinearCell(nn.Module):
    """A cell with h' = a * h + b, where a and b depend on the inputs only."""

    input_size: int
    hidden_size: int
    dtype: str = "float32"

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
        hidden = run_linear(a, b, carry.hidden)
        return HiddenCarry(hidden[:, -1]), hidden

    def initial_carry(self, batch_size: int) -> HiddenCarry:
        """Return the carry at the start of a text: zeros."""
        return HiddenCarry(jnp.zeros((batch_size, self.hidden_size)))


def run_linear(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Return h_1, ..., h_T for a and b [batch, time, features] and h_0 `first` [batch, features].

    A CPU computes them one after the other, which passes over the memory once; other devices
    compute them at once.
    """
    if jax.default_backend() == "cpu":
        return scan_linear(a, b, first)
    return compose_linear(a, b, first)


def scan_linear(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Compute `run_linear` step by step."""

    def step(hidden: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = ab[0] * hidden + ab[1]
        return hidden, hidden

    _, hidden = lax.scan(step, first, (a.swapaxes(0, 1), b.swapaxes(0, 1)))
    return hidden.swapaxes(0, 1)


def compose_linear(a: jax.Array, b: jax.Array, first: jax.Array) -> jax.Array:
    """Compute `run_linear` with an associative scan (Blelloch 1990), in log2(T) rounds.

    The composition of two steps is a step, (a2 a1, a2 b1 + b2), and composing is associative.
    """

    def compose(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a1, b1), (a2, b2) = earlier, later
        return a2 * a1, a2 * b1 + b2

    decays, hidden = lax.associative_scan(compose, (a, b), axis=1)
    return decays * first[:, None] + hidden
