"""The simple recurrent cell."""

import jax.numpy as jnp

from lstm_jax.cells.base import Cell, Inputs, Outputs
from lstm_jax.ops.gates import HiddenCarry, RNNParams


class RNNCell(Cell):
    """One step of a simple recurrent network (Elman 1990): h' = tanh(x W + h U + b)."""

    layer_params = RNNParams  # Remove it if you change the equations: see `Cell`.

    def setup(self) -> None:
        self.declare_kernels(1)

    def __call__(self, carry: HiddenCarry, inputs: Inputs) -> tuple[HiddenCarry, Outputs]:
        hidden = jnp.tanh(self.project_inputs(inputs) + self.project_hidden(carry.hidden))
        return HiddenCarry(hidden), hidden

    def activation(self, carry: HiddenCarry) -> Outputs:
        return carry.hidden
