"""The LSTM cell."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from lstm_jax.cells.base import Cell, Inputs, Outputs, forget_bias
from lstm_jax.ops.gates import LSTMCarry, LSTMParams


class LSTMCell(Cell):
    """One step of a long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        i = sigmoid(x Wi + h Ui + bi)    input gate: how much of the candidate is written
        f = sigmoid(x Wf + h Uf + bf)    forget gate: how much of the cell state is kept
        g = tanh(x Wg + h Ug + bg)       candidate
        o = sigmoid(x Wo + h Uo + bo)    output gate: how much of the cell state is shown
        c' = f * c + i * g
        h' = o * tanh(c')

    The cell state passes through time without an activation, so that gradients vanish slowly.
    """

    layer_params: ClassVar[Any] = LSTMParams  # Remove it if you change the equations: see `Cell`.

    def setup(self) -> None:
        self.declare_kernels(4, forget_bias(4, 1.0))  # 1 by Jozefowicz et al. 2015.

    def __call__(self, carry: LSTMCarry, inputs: Inputs) -> tuple[LSTMCarry, Outputs]:
        sums = self.project_inputs(inputs) + self.project_hidden(carry.hidden)
        i, f, g, o = jnp.split(sums, 4, axis=-1)
        cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return LSTMCarry(cell, hidden), hidden

    def activation(self, carry: LSTMCarry) -> Outputs:
        """Return the activation of the cell state, in [-1, 1]."""
        return jnp.tanh(carry.cell)

    def initial_carry(self, batch_size: int) -> LSTMCarry:
        return LSTMCarry.zeros(batch_size, self.hidden_size, float)
