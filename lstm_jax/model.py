"""The language model: embedding, stacked LSTM layers, dense. Pure `init` and `apply`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import threadpoolctl
from ml_collections import ConfigDict

from lstm_jax import recurrence
from lstm_jax.recurrence import Kernels, LayerCarry, Lookup, product

Params = dict[str, Any]


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

    This is the readable reference, to be run over time by a scan; `recurrence.fused` computes the
    same from the same parameters.

    Attributes:
      input_size: features of the inputs.
      hidden_size: the number of units.
      dtype: what matrix products multiply in.
    """

    input_size: int
    hidden_size: int
    dtype: str = "float32"

    def setup(self) -> None:
        """Declares the parameters."""
        gates = 4 * self.hidden_size
        glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        self.input_kernel = self.param("input_kernel", glorot, (self.input_size, gates))
        self.recurrent_kernel = self.param(
            "recurrent_kernel", orthogonal, (self.hidden_size, gates)
        )
        self.bias = self.param("bias", _forget_bias, (gates,))

    def __call__(self, carry: LayerCarry, inputs: jax.Array) -> tuple[LayerCarry, jax.Array]:
        """Takes the carry and inputs [batch, input_size]; gives the next carry and the outputs.

        The outputs [batch, hidden_size] are the carry's hidden state.
        """
        gates = (
            product(inputs, self.input_kernel, self.dtype)
            + product(carry.hidden, self.recurrent_kernel, self.dtype)
            + self.bias
        )
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return LayerCarry(cell, hidden), hidden

    def kernels(self) -> Kernels:
        """The parameters, for another implementation of the recurrence."""
        return Kernels(self.input_kernel, self.recurrent_kernel, self.bias)


class Dense(nn.Module):
    """The layer that turns hidden states into logits.

    Attributes:
      input_size: features of the inputs.
      output_size: features of the outputs.
      dtype: what the product multiplies in.
    """

    input_size: int
    output_size: int
    dtype: str = "float32"

    def setup(self) -> None:
        """Declares the parameters."""
        shape = (self.input_size, self.output_size)
        self.kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        self.bias = self.param("bias", nn.initializers.zeros, (self.output_size,))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[batch, time, input_size] → [batch, time, output_size]."""
        batch, time, features = inputs.shape
        # One product, feature-major as the recurrence is: that saves transposing its outputs.
        flat = inputs.transpose(2, 1, 0).reshape(features, time * batch)
        outputs = product(self.kernel.T, flat, self.dtype) + self.bias[:, None]
        return outputs.reshape(self.output_size, time, batch).transpose(2, 1, 0)


class LanguageModel(nn.Module):
    """Predicts the next token at every position.

    Attributes:
      vocabulary_size: ids are below it.
      embedding_size: features of an embedded token.
      hidden_size: units of each LSTM layer.
      num_layers: LSTM layers, each reading the one before.
      recurrence: how the layers run over time, one of `recurrence.IMPLEMENTATIONS`.
      dtype: what matrix products multiply in, "float32" or "bfloat16". Parameters, cell states,
        softmax and loss are float32 either way.
      rematerialize: see `recurrence.fused`.
    """

    vocabulary_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int = 1
    recurrence: str = "auto"
    dtype: str = "float32"
    rematerialize: int = 0

    def setup(self) -> None:
        """Declares the parts."""
        self.embedding = nn.Embed(
            self.vocabulary_size, self.embedding_size, embedding_init=_uniform
        )
        sizes = [self.embedding_size] + [self.hidden_size] * (self.num_layers - 1)
        self.lstm = [LSTMCell(size, self.hidden_size, self.dtype) for size in sizes]
        self.dense = Dense(self.hidden_size, self.vocabulary_size, self.dtype)

    def __call__(self, ids: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        """Reads `ids` and predicts what follows each of them.

        Args:
          ids: int32 [batch, time].
          carry: the state that reading the text so far left; `initial_carry` at its start.

        Returns:
          Logits, float32 [batch, time, vocabulary_size]: those at t are of the token after ids[t],
          given ids[..t]; and the carry after the last id.
        """
        embedded = Lookup(self.embedding.embedding, ids)
        outputs, layer_carry = self._run(self.lstm[0], embedded, carry[0])
        last = [layer_carry]
        for cell, layer_carry in zip(self.lstm[1:], carry[1:], strict=True):
            outputs, layer_carry = self._run(cell, outputs, layer_carry)
            last.append(layer_carry)
        return self.dense(outputs), tuple(last)

    def _run(
        self, cell: LSTMCell, inputs: jax.Array | Lookup, carry: LayerCarry
    ) -> tuple[jax.Array, LayerCarry]:
        """One layer over time: outputs [batch, time, hidden_size], and the carry."""
        implementation = recurrence.choose(self.recurrence, self.dtype)
        if implementation == "fused":
            return recurrence.fused(cell.kernels(), inputs, carry, self.dtype, self.rematerialize)
        if implementation == "cudnn":
            return recurrence.cudnn(cell.kernels(), inputs, carry)
        rows = inputs.rows if isinstance(inputs, Lookup) else inputs
        scan = nn.scan(
            lambda cell, carry, inputs: cell(carry, inputs),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        carry, outputs = scan(cell, carry, rows)
        return outputs, carry

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


def make_step(
    model: LanguageModel, params: Params
) -> Callable[[jax.Array, Carry], tuple[jax.Array, Carry]]:
    """The model for one token at a time: what `apply` computes for windows of length 1, faster.

    What is the same at every step is computed here, before it: call this outside of the loop.

    Returns:
      A function from ids [batch] and a carry to logits [batch, vocabulary_size] and the next carry.
    """
    bound = model.bind({"params": params})
    first, *others = [cell.kernels() for cell in bound.lstm]
    projected = recurrence.project(first, bound.embedding.embedding, model.dtype)
    first_kernel = first.recurrent.T
    kernels = [jnp.concatenate([k.input, k.recurrent]).T for k in others]
    head = bound.dense.kernel.T

    def step(ids: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        states = [LayerCarry(cell.T, hidden.T) for cell, hidden in carry]
        _, states[0] = recurrence.step(
            first_kernel, states[0].hidden, states[0], model.dtype, added=projected[ids].T
        )
        for layer, (kernel, other) in enumerate(zip(kernels, others, strict=True), start=1):
            inputs = jnp.concatenate([states[layer - 1].hidden, states[layer].hidden])
            _, states[layer] = recurrence.step(
                kernel, inputs, states[layer], model.dtype, added=other.bias[:, None]
            )
        logits = product(head, states[-1].hidden, model.dtype).T + bound.dense.bias
        return logits, tuple(LayerCarry(cell.T, hidden.T) for cell, hidden in states)

    return step


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
