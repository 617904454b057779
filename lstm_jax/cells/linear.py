"""A base for cells with a linear recurrence, whose steps can be computed at once."""

from lstm_jax import ops
from lstm_jax.cells.base import Inputs, Outputs, Reset, SizedCell
from lstm_jax.ops.gates import HiddenCarry

Coefficients = tuple[Outputs, Outputs]  # a and b.


class LinearCell(SizedCell):
    """A cell with h' = a * h + b, where a and b depend on the inputs only."""

    def coefficients(self, inputs: Inputs) -> Coefficients:
        """Return a and b of one or all steps."""
        raise NotImplementedError

    def __call__(self, carry: HiddenCarry, inputs: Inputs) -> tuple[HiddenCarry, Outputs]:
        """Return the next carry and the outputs."""
        a, b = self.coefficients(inputs)
        hidden = a * carry.hidden + b
        return HiddenCarry(hidden), hidden

    def run_parallel(
        self, carry: HiddenCarry, inputs: Inputs, reset: Reset | None
    ) -> tuple[HiddenCarry, Outputs]:
        """Return the last carry and all outputs."""
        return ops.linear_scan(*self.coefficients(inputs), carry, reset=reset)
