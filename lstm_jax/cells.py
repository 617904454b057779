"""The recurrent cells: one step each, written to be read, and run over time by a scan.

Every cell is a flax module with the same interface: `cell(carry, inputs)` gives the next carry and
the outputs [batch, hidden_size], and `cell.initial_carry(batch_size)` the carry at the start of a
text. For those who look inside, `cell.gates(carry, inputs)` gives the gates of that step, and
`cell.activation(carry)` what the units hold. Gates stand side by side in `input_kernel`
[in, gates * hidden_size], `recurrent_kernel` [hidden_size, gates * hidden_size] and `bias`
[gates * hidden_size].

| cell      | gates      | parameters, with n inputs and h units      |
| --------- | ---------- | ------------------------------------------ |
| lstm      | i, f, g, o | 4h (n + h + 1)                             |
| mogrifier | i, f, g, o | 4h (n + h + 1) + rounds * n * h            |
| gru       | r, z, n    | 3h (n + h + 1) + h                         |
| rnn       | the output | h (n + h + 1)                              |

With layer normalisation each has gates * h more for the inputs, as many for the hidden state, and
an LSTM another 2h for its cell state.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lstm_jax.recurrence import Kernels, LayerCarry, product

# What a step computes with, by name, [batch, hidden_size] each: gates in 0..1, and the "candidate"
# in ±1, which is no gate.
Gates = dict[str, jax.Array]


class HiddenCarry(NamedTuple):
    """What a layer without a cell state hands on.

    Attributes:
      hidden: float32 [batch, hidden], which is also the layer's output.
    """

    hidden: jax.Array


class _Cell(nn.Module):
    """What all cells have: the kernels, and the sums that their gates are made from.

    Attributes:
      input_size: features of the inputs.
      hidden_size: the number of units.
      dtype: what matrix products multiply in.
      layer_norm: normalise what inputs and hidden state add to the gates, each for itself
        (Ba et al. 2016).
    """

    input_size: int
    hidden_size: int
    dtype: str = "float32"
    layer_norm: bool = False

    def _declare(self, gates: int, bias: Any = nn.initializers.zeros) -> None:
        size = gates * self.hidden_size
        glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        self.recurrent_kernel = self.param("recurrent_kernel", orthogonal, (self.hidden_size, size))
        self.bias = self.param("bias", bias, (size,))
        if self.layer_norm:
            self.input_scale = self.param("input_scale", nn.initializers.ones, (size,))
            self.recurrent_scale = self.param("recurrent_scale", nn.initializers.ones, (size,))

    def _from_inputs(self, inputs: jax.Array) -> jax.Array:
        """What the inputs add to the gates, bias included: [batch, gates * hidden_size]."""
        added = product(inputs, self.input_kernel, self.dtype)
        return (normalize(added) * self.input_scale if self.layer_norm else added) + self.bias

    def _from_hidden(self, hidden: jax.Array) -> jax.Array:
        """What the hidden state adds to the gates: [batch, gates * hidden_size]."""
        added = product(hidden, self.recurrent_kernel, self.dtype)
        return normalize(added) * self.recurrent_scale if self.layer_norm else added

    def activation(self, carry: Any) -> jax.Array:
        """What the units hold, in ±1, [batch, hidden_size]: the hidden state."""
        return carry.hidden

    def _zeros(self, batch_size: int) -> jax.Array:
        return jnp.zeros((batch_size, self.hidden_size))


class LSTMCell(_Cell):
    """One step of a long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        i = sigmoid(x Wi + h Ui + bi)    input gate: how much of the candidate is written
        f = sigmoid(x Wf + h Uf + bf)    forget gate: how much of the cell state is kept
        g = tanh(x Wg + h Ug + bg)       candidate
        o = sigmoid(x Wo + h Uo + bo)    output gate: how much of the cell state is shown
        c' = f * c + i * g
        h' = o * tanh(c')

    The cell state goes through time with no activation on its way, so that gradients last. With
    `layer_norm`, x W and h U are normalised, and c' where it is shown.

    This is the readable reference; `recurrence.fused` computes the same from the same parameters.
    """

    def setup(self) -> None:
        """Declares the parameters."""
        self._declare(4, _forget_bias)
        if self.layer_norm:
            self.cell_scale = self.param("cell_scale", nn.initializers.ones, (self.hidden_size,))
            self.cell_bias = self.param("cell_bias", nn.initializers.zeros, (self.hidden_size,))

    def __call__(self, carry: LayerCarry, inputs: jax.Array) -> tuple[LayerCarry, jax.Array]:
        """Takes the carry and inputs [batch, input_size]; gives the next carry and the outputs.

        The outputs [batch, hidden_size] are the carry's hidden state.
        """
        gates = self.gates(carry, inputs)
        cell = gates["forget"] * carry.cell + gates["input"] * gates["candidate"]
        hidden = gates["output"] * self.activation(carry._replace(cell=cell))
        return LayerCarry(cell, hidden), hidden

    def gates(self, carry: LayerCarry, inputs: jax.Array) -> Gates:
        """The gates of a step."""
        sums = self._from_inputs(inputs) + self._from_hidden(carry.hidden)
        i, f, g, o = jnp.split(sums, 4, axis=-1)
        return {
            "input": nn.sigmoid(i),
            "forget": nn.sigmoid(f),
            "candidate": jnp.tanh(g),
            "output": nn.sigmoid(o),
        }

    def activation(self, carry: LayerCarry) -> jax.Array:
        """The cell state as the output gate lets it out, in ±1: [batch, hidden_size]."""
        if self.layer_norm:
            return jnp.tanh(normalize(carry.cell) * self.cell_scale + self.cell_bias)
        return jnp.tanh(carry.cell)

    def kernels(self) -> Kernels:
        """The parameters, for another implementation of the recurrence."""
        return Kernels(self.input_kernel, self.recurrent_kernel, self.bias)

    def initial_carry(self, batch_size: int) -> LayerCarry:
        """Zeros, an array of its own for each state: a training step donates each of them."""
        return LayerCarry(self._zeros(batch_size), self._zeros(batch_size))


class MogrifierLSTMCell(LSTMCell):
    """An LSTM whose inputs and hidden state scale each other first (Melis et al. 2019).

    In rounds k = 1, 2, ... in turn:

        x = 2 sigmoid(h Q_k) * x    for odd k
        h = 2 sigmoid(x R_k) * h    for even k

    Attributes:
      rounds: how many of them.
    """

    rounds: int = 5

    def setup(self) -> None:
        """Declares the parameters: those of the LSTM, and a kernel for each round."""
        super().setup()
        glorot = nn.initializers.glorot_uniform()
        shapes = [(self.hidden_size, self.input_size), (self.input_size, self.hidden_size)]
        self.round_kernels = [
            self.param(f"round_kernel_{k + 1}", glorot, shapes[k % 2]) for k in range(self.rounds)
        ]

    def gates(self, carry: LayerCarry, inputs: jax.Array) -> Gates:
        """The gates of a step."""
        hidden = carry.hidden
        for k, kernel in enumerate(self.round_kernels):
            if k % 2 == 0:
                inputs = 2 * nn.sigmoid(product(hidden, kernel, self.dtype)) * inputs
            else:
                hidden = 2 * nn.sigmoid(product(inputs, kernel, self.dtype)) * hidden
        return super().gates(carry._replace(hidden=hidden), inputs)


class GRUCell(_Cell):
    """One step of a gated recurrent unit (Cho et al. 2014), its reset gate after the product.

        r = sigmoid(x Wr + h Ur + br)            reset gate
        z = sigmoid(x Wz + h Uz + bz)            update gate: how much is kept
        n = tanh(x Wn + bn + r * (h Un + un))    candidate; un is `recurrent_bias` [hidden_size]
        h' = (1 - z) * n + z * h

    cuDNN, PyTorch and Keras compute this variant.
    """

    def setup(self) -> None:
        """Declares the parameters."""
        self._declare(3)
        shape = (self.hidden_size,)
        self.recurrent_bias = self.param("recurrent_bias", nn.initializers.zeros, shape)

    def __call__(self, carry: HiddenCarry, inputs: jax.Array) -> tuple[HiddenCarry, jax.Array]:
        """Takes the carry and inputs [batch, input_size]; gives the next carry and the outputs."""
        gates = self.gates(carry, inputs)
        update = gates["update"]
        hidden = (1 - update) * gates["candidate"] + update * carry.hidden
        return HiddenCarry(hidden), hidden

    def gates(self, carry: HiddenCarry, inputs: jax.Array) -> Gates:
        """The gates of a step."""
        xr, xz, xn = jnp.split(self._from_inputs(inputs), 3, axis=-1)
        hr, hz, hn = jnp.split(self._from_hidden(carry.hidden), 3, axis=-1)
        reset = nn.sigmoid(xr + hr)
        candidate = jnp.tanh(xn + reset * (hn + self.recurrent_bias))
        return {"reset": reset, "update": nn.sigmoid(xz + hz), "candidate": candidate}

    def initial_carry(self, batch_size: int) -> HiddenCarry:
        """Zeros."""
        return HiddenCarry(self._zeros(batch_size))


class RNNCell(_Cell):
    """One step of a simple recurrent network (Elman 1990): h' = tanh(x W + h U + b)."""

    def setup(self) -> None:
        """Declares the parameters."""
        self._declare(1)

    def __call__(self, carry: HiddenCarry, inputs: jax.Array) -> tuple[HiddenCarry, jax.Array]:
        """Takes the carry and inputs [batch, input_size]; gives the next carry and the outputs."""
        hidden = self.gates(carry, inputs)["candidate"]
        return HiddenCarry(hidden), hidden

    def gates(self, carry: HiddenCarry, inputs: jax.Array) -> Gates:
        """The candidate alone, which is the next hidden state: nothing opens or closes."""
        sums = self._from_inputs(inputs) + self._from_hidden(carry.hidden)
        return {"candidate": jnp.tanh(sums)}

    def initial_carry(self, batch_size: int) -> HiddenCarry:
        """Zeros."""
        return HiddenCarry(self._zeros(batch_size))


# Read-only: a cell that a config file added would train, and no other command would know it.
CELLS = MappingProxyType(
    {"lstm": LSTMCell, "mogrifier": MogrifierLSTMCell, "gru": GRUCell, "rnn": RNNCell}
)


def normalize(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the last axis (Ba et al. 2016), gains and biases left out."""
    return nn.standardize(x, axis=-1, epsilon=1e-5)


def _forget_bias(key: jax.Array, shape: tuple[int], dtype: Any = jnp.float32) -> jax.Array:
    """Zero but for the forget gate, which starts at 1 (Jozefowicz et al. 2015)."""
    gates = jnp.zeros((4, shape[0] // 4), dtype).at[1].set(1.0)
    return gates.reshape(shape)
