"""The Mogrifier LSTM cell."""

import flax.linen as nn

from lstm_jax.cells.base import Inputs, Outputs
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.errors import UserError
from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import LSTMCarry


class MogrifierLSTMCell(LSTMCell):
    """An LSTM whose inputs and hidden state scale each other first (Melis et al. 2020).

    In rounds k = 1, 2, ...:

        x = 2 sigmoid(h Q_k) * x    for odd k
        h = 2 sigmoid(x R_k) * h    for even k
    """

    rounds: int = 5

    def setup(self) -> None:
        """Declare the parameters: those of the LSTM, and a kernel for each round."""
        if not 0 <= self.rounds <= 100:  # A model from elsewhere must not take hours to open.
            raise UserError(f"config.model.options.rounds is {self.rounds}: it must be 0 to 100")
        super().setup()
        glorot = nn.initializers.glorot_uniform()
        shapes = [(self.hidden_size, self.input_size), (self.input_size, self.hidden_size)]
        self.round_kernels = [
            self.param(f"round_kernel_{k + 1}", glorot, shapes[k % 2]) for k in range(self.rounds)
        ]

    def __call__(self, carry: LSTMCarry, inputs: Inputs) -> tuple[LSTMCarry, Outputs]:
        hidden = carry.hidden
        for k, kernel in enumerate(self.round_kernels):
            if k % 2 == 0:
                inputs = 2 * nn.sigmoid(matmul(hidden, kernel, self.dtype)) * inputs
            else:
                hidden = 2 * nn.sigmoid(matmul(inputs, kernel, self.dtype)) * hidden
        return super().__call__(carry._replace(hidden=hidden), inputs)
