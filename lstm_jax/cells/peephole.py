"""The peephole LSTM cell."""

import flax.linen as nn
import jax.numpy as jnp

from lstm_jax.cells.base import Inputs, Outputs
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.ops.gates import LSTMCarry, PeepholeLSTMParams


class PeepholeLSTMCell(LSTMCell):
    """An LSTM whose gates see the cell state (Gers & Schmidhuber 2000).

        i = sigmoid(x Wi + h Ui + pi * c + bi)      input gate
        f = sigmoid(x Wf + h Uf + pf * c + bf)      forget gate
        g = tanh(x Wg + h Ug + bg)                  candidate
        c' = f * c + i * g
        o = sigmoid(x Wo + h Uo + po * c' + bo)     output gate, which sees the new cell state
        h' = o * tanh(c')

    The peephole weights pi, pf, po are the rows of `peepholes` [3, hidden_size].
    """

    layer_params = PeepholeLSTMParams  # Remove it if you change the equations: see `Cell`.

    def setup(self) -> None:
        """Declare the parameters: those of the LSTM, and the peephole weights, initially 0."""
        super().setup()
        self.peepholes = self.param("peepholes", nn.initializers.zeros, (3, self.hidden_size))

    def __call__(self, carry: LSTMCarry, inputs: Inputs) -> tuple[LSTMCarry, Outputs]:
        pi, pf, po = self.peepholes[:, None]
        sums = self.project_inputs(inputs) + self.project_hidden(carry.hidden)
        i, f, g, o = jnp.split(sums, 4, axis=-1)
        i, f = nn.sigmoid(i + pi * carry.cell), nn.sigmoid(f + pf * carry.cell)
        cell = f * carry.cell + i * jnp.tanh(g)
        hidden = nn.sigmoid(o + po * cell) * jnp.tanh(cell)
        return LSTMCarry(cell, hidden), hidden
