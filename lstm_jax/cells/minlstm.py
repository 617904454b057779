"""The minLSTM cell."""

import flax.linen as nn
import jax.numpy as jnp

from lstm_jax.cells.base import Inputs, LinearCell, Outputs
from lstm_jax.cells.mingru import make_positive


class MinLSTMCell(LinearCell):
    """One step of a minLSTM (Feng et al. 2024): an LSTM whose gates see the input only.

        f = sigmoid(x Wf + bf)          forget gate
        i = sigmoid(x Wi + bi)          input gate
        n = g(x Wn + bn)                candidate, with g(x) = x + 1/2 for x >= 0, else sigmoid(x)
        h' = f / (f + i) * h + i / (f + i) * n

    The two weights of a step add up to 1, so that the scale of h does not grow with time.
    """

    def setup(self) -> None:
        """Declare the parameters; f, i, n are side by side."""
        self.declare_kernels(3, is_recurrent=False)

    def coefficients(self, inputs: Inputs) -> tuple[Outputs, Outputs]:
        """Return f / (f + i) and i / (f + i) * n of one or all steps."""
        f, i, n = jnp.split(self.project_inputs(inputs), 3, axis=-1)
        # f / (f + i) is a sigmoid itself, of log f - log i, and so never 0 / 0.
        ratio = nn.log_sigmoid(f) - nn.log_sigmoid(i)
        return nn.sigmoid(ratio), nn.sigmoid(-ratio) * make_positive(n)
