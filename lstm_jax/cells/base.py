"""Bases of cells: common fields, and the kernels of gates that read inputs and hidden state.

Gates are side by side in `input_kernel` [in, gates * hidden_size], `recurrent_kernel`
[hidden_size, gates * hidden_size] and `bias` [gates * hidden_size].
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lstm_jax.cells.protocol import Inputs, Outputs
from lstm_jax.matmul import matmul
from lstm_jax.ops.gates import HiddenCarry


class SizedCell(nn.Module):
    """The fields of most cells, and the first carry of one without a cell state."""

    input_size: int  # Features of the inputs.
    hidden_size: int  # The number of hidden units.
    dtype: str = "float32"  # The dtype of matmul operands, "float32" or "bfloat16".

    def initial_carry(self, batch_size: int) -> Any:
        """Return the carry at the start of a text: zeros."""
        return HiddenCarry(jnp.zeros((batch_size, self.hidden_size)))


class Cell(SizedCell):
    """A cell whose gates read x W + b and h U. The protocol does not require this base class."""

    def declare_kernels(self, gates: int, bias: Initializer = nn.initializers.zeros) -> None:
        """Declare the kernels and the bias for this number of gates; call it in `setup`."""
        size = gates * self.hidden_size
        glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        self.recurrent_kernel = self.param("recurrent_kernel", orthogonal, (self.hidden_size, size))
        self.bias = self.param("bias", bias, (size,))

    def project_inputs(self, inputs: Inputs) -> Float[Array, "batch sums"]:
        """Return x W + b: [batch, gates * hidden_size]."""
        return matmul(inputs, self.input_kernel, self.dtype, self.bias)

    def project_hidden(self, hidden: Outputs) -> Float[Array, "batch sums"]:
        """Return h U: [batch, gates * hidden_size], for gates that all read the same state."""
        return matmul(hidden, self.recurrent_kernel, self.dtype)

    def activation(self, carry: Any) -> Outputs:
        """Return the activations of the hidden units, in [-1, 1]."""
        return carry.hidden


def forget_bias(gates: int, opened: float | Array) -> Initializer:
    """Return an initializer of the biases of gates, the second of which is a forget gate.

    Its biases are `opened`, one number or one for each hidden unit, so that it remembers at first.
    All others are 0.
    """

    def initialize(key: Array, shape: tuple[int], dtype: DTypeLike = jnp.float32) -> Array:
        biases = jnp.zeros((gates, shape[0] // gates), dtype)
        return biases.at[1].set(jnp.asarray(opened, dtype)).reshape(shape)

    return initialize
