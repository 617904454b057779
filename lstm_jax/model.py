"""The language model: embedding, stacked LSTM layers, dense. Pure `init` and `apply`."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import threadpoolctl
from ml_collections import ConfigDict

Params = dict[str, Any]


class LayerCarry(NamedTuple):
    """What one LSTM layer hands on from step to step.

    Attributes:
      cell: float32 [batch, hidden_size], the cell state c.
      hidden: float32 [batch, hidden_size], the hidden state h, which is also the layer's output.
    """

    cell: jax.Array
    hidden: jax.Array


_PARTS = ("embedding", "lstm", "dense")  # In the order in which data goes through them.

Carry = tuple[LayerCarry, ...]  # One for each layer, the first layer first.


def _forget_bias(key: jax.Array, shape: tuple[int], dtype: Any = jnp.float32) -> jax.Array:
    """Zero but for the forget gate, which starts at 1 (Jozefowicz et al. 2015)."""
    gates = jnp.zeros((4, shape[0] // 4), dtype).at[1].set(1.0)
    return gates.reshape(shape)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in ±0.05, as Keras initialises embeddings."""
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


class LSTMCell(nn.Module):
    """One step of a long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        i = sigmoid(x Wi + h Ui + bi)    input gate: how much of the candidate is written
        f = sigmoid(x Wf + h Uf + bf)    forget gate: how much of the cell state is kept
        g = tanh(x Wg + h Ug + bg)       candidate
        o = sigmoid(x Wo + h Uo + bo)    output gate: how much of the cell state is shown
        c' = f * c + i * g
        h' = o * tanh(c')

    The cell state goes through time with no activation on its way, so that gradients last. The four
    gates stand side by side, in the order i, f, g, o, in `input_kernel` [in, 4 * hidden_size],
    `recurrent_kernel` [hidden_size, 4 * hidden_size] and `bias` [4 * hidden_size].

    Attributes:
      hidden_size: the number of units.
    """

    hidden_size: int

    @nn.compact
    def __call__(self, carry: LayerCarry, inputs: jax.Array) -> tuple[LayerCarry, jax.Array]:
        """Takes the carry and inputs [batch, in]; gives the next carry and outputs [batch, hidden].

        The outputs are the carry's hidden state.
        """
        gates_shape = 4 * self.hidden_size
        input_kernel = self.param(
            "input_kernel", nn.initializers.glorot_uniform(), (inputs.shape[-1], gates_shape)
        )
        recurrent_kernel = self.param(
            "recurrent_kernel", nn.initializers.orthogonal(), (self.hidden_size, gates_shape)
        )
        bias = self.param("bias", _forget_bias, (gates_shape,))
        gates = inputs @ input_kernel + carry.hidden @ recurrent_kernel + bias
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return LayerCarry(cell, hidden), hidden


class LanguageModel(nn.Module):
    """Predicts the next token at every position.

    Attributes:
      vocabulary_size: ids are below it.
      embedding_size: features of an embedded token.
      hidden_size: units of each LSTM layer.
      num_layers: LSTM layers, each reading the one before.
    """

    vocabulary_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int = 1

    @nn.compact
    def __call__(self, ids: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        """Reads `ids` and predicts what follows each of them.

        Args:
          ids: int32 [batch, time].
          carry: the state that reading the text so far left; `initial_carry` at its start.

        Returns:
          Logits, float32 [batch, time, vocabulary_size]: those at t are of the token after ids[t],
          given ids[..t]; and the carry after the last id.
        """
        layer = nn.scan(
            LSTMCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        features = nn.Embed(
            self.vocabulary_size, self.embedding_size, embedding_init=_uniform, name="embedding"
        )(ids)
        last = []
        for index in range(self.num_layers):
            layer_carry, features = layer(self.hidden_size, name=f"lstm_{index}")(
                carry[index], features
            )
            last.append(layer_carry)
        logits = nn.Dense(
            self.vocabulary_size, kernel_init=nn.initializers.glorot_uniform(), name="dense"
        )(features)
        return logits, tuple(last)

    def initial_carry(self, batch_size: int) -> Carry:
        """The carry at the start of a text: zeros."""
        shape = (batch_size, self.hidden_size)
        # No two are the same array: a training step donates each of them.
        return tuple(LayerCarry(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.num_layers))


def from_config(model: ConfigDict, vocabulary_size: int) -> LanguageModel:
    """The model that the `model` fields of a config describe."""
    return LanguageModel(vocabulary_size=vocabulary_size, **model)


def init(model: LanguageModel, key: jax.Array) -> Params:
    """Fresh parameters, initialised as Keras does.

    Uniform ±0.05 embedding, Glorot uniform kernels, orthogonal recurrent kernels, zero biases but 1
    for the forget gates.
    """
    ids, carry = jnp.zeros((1, 1), jnp.int32), model.initial_carry(1)
    # The orthogonal kernels come from LAPACK, whose threads wait for each other by spinning: with
    # another process on the cores, 0.2 s become 15.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        return jax.block_until_ready(jax.jit(model.init)(key, ids, carry)["params"])


def apply(
    model: LanguageModel, params: Params, ids: jax.typing.ArrayLike, carry: Carry
) -> tuple[jax.Array, Carry]:
    """`LanguageModel.__call__` as a pure function of the parameters."""
    outputs: Any = model.apply({"params": params}, ids, carry)
    return outputs


def parameter_table(params: Params) -> str:
    """The shapes and counts of all parameters, with a sum for each part, as lines of text."""
    rows: list[tuple[str, str, int]] = []
    for part in sorted(params, key=lambda name: _PARTS.index(name.split("_")[0])):
        arrays = params[part]
        rows.append((part, "", sum(array.size for array in arrays.values())))
        rows += [
            (f"  {name}", str(list(array.shape)), array.size) for name, array in arrays.items()
        ]
    rows.append(("total", "", sum(array.size for array in jax.tree.leaves(params))))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {shape:>14}  {count:>12,}" for name, shape, count in rows)
