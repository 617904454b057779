"""A base for cells with a linear recurrence, whose steps can be computed at once."""

import jax

from lstm_jax import ops
from lstm_jax.cells.base import SizedCell
from lstm_jax.ops.gates import HiddenCarry


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
        return ops.linear_scan(*self.coefficients(inputs), carry, reset=starts)
