"""The multiplicative LSTM cell."""

import flax.linen as nn

from lstm_jax.cells.base import Inputs, Outputs
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import LSTMCarry


class MultiplicativeLSTMCell(LSTMCell):
    """An LSTM whose hidden state is first scaled by the inputs (Krause et al. 2016).

        m = (x V) * (h R)

    The gates and the candidate read m instead of h. The paper calls this cell mLSTM, which here is
    the LSTM with a matrix memory, `cells.mlstm`.
    """

    def setup(self) -> None:
        """Declare the parameters: those of the LSTM, and the kernels V and R, without biases."""
        super().setup()
        glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        shape = self.input_size, self.hidden_size
        self.input_factor = self.param("input_factor", glorot, shape)
        self.hidden_factor = self.param("hidden_factor", orthogonal, (self.hidden_size,) * 2)

    def __call__(self, carry: LSTMCarry, inputs: Inputs) -> tuple[LSTMCarry, Outputs]:
        scales = matmul(inputs, self.input_factor, self.dtype)
        m = scales * matmul(carry.hidden, self.hidden_factor, self.dtype)
        return super().__call__(carry._replace(hidden=m), inputs)
