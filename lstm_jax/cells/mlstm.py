"""The mLSTM cell."""

import flax.linen as nn
import jax.numpy as jnp

from lstm_jax import ops
from lstm_jax.cells.base import Cell, Inputs, Outputs, Reset, forget_bias
from lstm_jax.cells.slstm import count_per_head
from lstm_jax.ops.scans import MLSTMCarry, MLSTMParams


class MLSTMCell(Cell):
    """One step of an mLSTM: an LSTM whose cell state is a matrix (Beck et al. 2024).

    Each of the heads has d = hidden_size / heads hidden units:

        q = x Wq + bq                           query [d]
        k = (x Wk + bk) / sqrt(d)               key [d]
        v = x Wv + bv                           value [d]
        i = exp(x wi + bi)                      input gate, a number for each head
        f = sigmoid(x wf + bf)                  forget gate, a number for each head
        o = sigmoid(x Wo + bo)                  output gate [d]
        C' = f C + i k v^T                      memory: values stored under keys
        n' = f n + i k                          normalizer
        h' = o * (q^T C') / max(|q . n'|, 1)    the value under the query

    C and n are divided by exp(m), with the stabilizer m' = max(log f + m, log i), and the 1 becomes
    exp(-m'), so that no exponential overflows.
    """

    heads: int = 4

    def setup(self) -> None:
        """Declare the parameters; q, k, v, o are side by side, and so are i, f of all heads."""
        count_per_head(self.hidden_size, self.heads)
        self.declare_kernels(4, is_recurrent=False)
        shape = self.input_size, 2 * self.heads
        self.gate_kernel = self.param("gate_kernel", nn.initializers.zeros, shape)
        bias_init = forget_bias(2, jnp.linspace(3, 6, self.heads))
        self.gate_bias = self.param("gate_bias", bias_init, (2 * self.heads,))

    def __call__(self, carry: MLSTMCarry, inputs: Inputs) -> tuple[MLSTMCarry, Outputs]:
        carry, outputs = self.run_parallel(carry, inputs[:, None], None)
        return carry, outputs[:, 0]

    def run_parallel(
        self, carry: MLSTMCarry, inputs: Inputs, reset: Reset | None
    ) -> tuple[MLSTMCarry, Outputs]:
        params = MLSTMParams(self.input_kernel, self.bias, self.gate_kernel, self.gate_bias)
        return ops.mlstm(params, inputs, carry, reset=reset, dtype=self.dtype)

    def initial_carry(self, batch_size: int) -> MLSTMCarry:
        """Return the carry at the start of a text: zeros, and a stabilizer of `NEVER`."""
        size = count_per_head(self.hidden_size, self.heads)
        return MLSTMCarry.zeros(batch_size, self.heads, size)
