"""The simple recurrent cell."""

from typing import Any, ClassVar

import jax.numpy as jnp

from lstm_jax.cells.base import Cell, Inputs, Outputs
from lstm_jax.ops.gates import HiddenCarry, RNNParams


class RNNCell(Cell):
    """One step of a simple recurrent network (Elman 1990): h' = tanh(x W + h U + b)."""

    # `lstm_jax.ops` computes the same equations faster. Without this line, a cell runs by its own.
    layer_params: ClassVar[type[Any]] = RNNParams

    def setup(self) -> None:
        """Declare the parameters."""
        self.declare_kernels(1)

    def __call__(self, carry: HiddenCarry, inputs: Inputs) -> tuple[HiddenCarry, Outputs]:
        """Return the next carry and the outputs."""
        hidden = jnp.tanh(self.project_inputs(inputs) + self.project_hidden(carry.hidden))
        return HiddenCarry(hidden), hidden

    def activation(self, carry: HiddenCarry) -> Outputs:
        """Return the activations of the hidden units, in [-1, 1]."""
        return carry.hidden
