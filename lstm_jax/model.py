"""The language model: embedding, stacked recurrent layers, dense. Pure `init_params` and `apply`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from ml_collections import ConfigDict

from lstm_jax import fused
from lstm_jax.cells import CELLS, HiddenCarry, LSTMCarry, MogrifierLSTMCell
from lstm_jax.fused import Lookup
from lstm_jax.matmul import matmul, round_factor

Params = dict[str, Any]

# A parameter beyond it is as good as infinite: the squares of such would be, in float32.
_LARGEST = 1e18

# What the dense layer's bias begins as: the logarithms of the tokens' frequencies, or zeros.
INITIAL_BIASES = ("frequencies", "zeros")

Carry = tuple[LSTMCarry | HiddenCarry, ...]  # One for each layer, the first layer first.

# What the inputs of each layer and, last, the outputs of the last one are multiplied by at every
# step: [batch, features] each, or None for nothing. `regularization.draw_masks` makes them.
Masks = Sequence[jax.Array | None]


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in ±0.05, as Keras initialises embeddings."""
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


class Dense(nn.Module):
    """The layer that turns hidden states into logits.

    Attributes:
      input_size: features of the inputs.
      output_size: features of the outputs.
      tied: whether the kernel is another's, given with each call.
      dtype: what the product multiplies in.
    """

    input_size: int
    output_size: int
    tied: bool = False
    dtype: str = "float32"

    def setup(self) -> None:
        """Declares the parameters."""
        shape = (self.input_size, self.output_size)
        if not self.tied:
            self.kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        self.bias = self.param("bias", nn.initializers.zeros, (self.output_size,))

    def __call__(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        """[batch, time, input_size] → [batch, time, output_size]."""
        batch, time, features = inputs.shape
        # One product, feature-major as the recurrence is: that saves transposing its outputs.
        flat = inputs.transpose(2, 1, 0).reshape(features, time * batch)
        outputs = matmul(kernel.T, flat, self.dtype) + self.bias[:, None]
        return outputs.reshape(self.output_size, time, batch).transpose(2, 1, 0)


class LanguageModel(nn.Module):
    """Predicts the next token at every position.

    Attributes:
      vocabulary_size: ids are below it.
      embedding_size: features of an embedded token.
      hidden_size: units of each recurrent layer.
      num_layers: recurrent layers, each reading the one before.
      recurrence: how the layers run over time, one of `fused.IMPLEMENTATIONS`.
      dtype: what matrix products multiply in, "float32" or "bfloat16". Parameters, cell states,
        softmax and loss are float32 either way.
      rematerialize: see `fused.run_fused`.
      cell: the kind of the layers, one of `cells.CELLS`.
      layer_norm: whether cells normalise what goes into their gates.
      mogrifier_rounds: of the cell "mogrifier".
      tie_embeddings: whether the dense layer's kernel is the embedding table, transposed (Press &
        Wolf 2017; Inan et al. 2017). The last layer then has `embedding_size` units.
      initial_scale: what fresh kernels and embeddings are multiplied by.
      initial_bias: of the dense layer, one of `INITIAL_BIASES`.
    """

    vocabulary_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int = 1
    recurrence: str = "auto"
    dtype: str = "float32"
    rematerialize: int = 0
    cell: str = "lstm"
    layer_norm: bool = False
    mogrifier_rounds: int = 5
    tie_embeddings: bool = False
    initial_scale: float = 1.0
    initial_bias: str = "frequencies"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features of the embedding and of each layer."""
        last = self.embedding_size if self.tie_embeddings else self.hidden_size
        return (self.embedding_size, *[self.hidden_size] * (self.num_layers - 1), last)

    def setup(self) -> None:
        """Declares the parts."""
        self.embedding = nn.Embed(
            self.vocabulary_size, self.embedding_size, embedding_init=_uniform
        )
        for name, cell in self._make_cells().items():
            setattr(self, name, cell)
        self.dense = Dense(self.sizes[-1], self.vocabulary_size, self.tie_embeddings, self.dtype)

    @nn.nowrap  # So that it can be called on a model without parameters.
    def _make_cells(self) -> dict[str, nn.Module]:
        """The layers by name, lstm_0 the first."""
        own: dict[str, Any] = {}
        if CELLS[self.cell] is MogrifierLSTMCell:
            own["rounds"] = self.mogrifier_rounds
        return {
            f"{self.cell}_{i}": CELLS[self.cell](
                self.sizes[i], self.sizes[i + 1], self.dtype, self.layer_norm, **own
            )
            for i in range(self.num_layers)
        }

    @property
    def layers(self) -> list[Any]:
        """The layers of a bound model."""
        return [getattr(self, f"{self.cell}_{i}") for i in range(self.num_layers)]

    def __call__(
        self, ids: jax.Array, carry: Carry, masks: Masks | None = None
    ) -> tuple[jax.Array, Carry]:
        """Reads `ids` and predicts what follows each of them.

        Args:
          ids: int32 [batch, time].
          carry: the state that reading the text so far left; `initial_carry` at its start.
          masks: dropout, in training.

        Returns:
          Logits, float32 [batch, time, vocabulary_size]: those at t are of the token after ids[t],
          given ids[..t]; and the carry after the last id.
        """
        outputs, carry = self.run(ids, carry, masks)
        if masks is not None:
            outputs = apply_mask(outputs, masks[-1])
        return self.predict(outputs), carry

    def run(
        self, ids: jax.Array, carry: Carry, masks: Masks | None = None
    ) -> tuple[jax.Array, Carry]:
        """The layers alone: outputs of the last one [batch, time, features], and the carry.

        The last mask, which is that of the outputs, is not used.
        """
        inputs: jax.Array | Lookup = Lookup(self.embedding.embedding, ids)
        last = []
        for i, (cell, layer_carry) in enumerate(zip(self.layers, carry, strict=True)):
            if masks is not None and masks[i] is not None:
                rows = inputs.rows if isinstance(inputs, Lookup) else inputs
                inputs = apply_mask(rows, masks[i])
            inputs, layer_carry = self._run_layer(cell, inputs, layer_carry)
            last.append(layer_carry)
        assert isinstance(inputs, jax.Array)
        return inputs, tuple(last)

    def predict(self, outputs: jax.Array) -> jax.Array:
        """Outputs of the last layer [batch, time, features] → logits [batch, time, vocabulary]."""
        return self.dense(outputs, self.head_kernel())

    def head_kernel(self) -> jax.Array:
        """The kernel of the dense layer, [features, vocabulary_size]."""
        return self.embedding.embedding.T if self.tie_embeddings else self.dense.kernel

    def implementation(self) -> str:
        """How the layers run over time: what `fused.choose` makes of `recurrence`.

        Raises:
          ValueError: if what is asked for can't run this model here.
        """
        plain = self.cell == "lstm" and not self.layer_norm
        return fused.choose(self.recurrence, self.dtype, plain)

    def _run_layer(
        self, cell: Any, inputs: jax.Array | Lookup, carry: Any
    ) -> tuple[jax.Array, LSTMCarry | HiddenCarry]:
        """One layer over time: outputs [batch, time, hidden_size], and the carry."""
        implementation = self.implementation()
        if implementation == "fused":
            return fused.run_fused(cell.kernels(), inputs, carry, self.dtype, self.rematerialize)
        if implementation == "cudnn":
            return fused.run_cudnn(cell.kernels(), inputs, carry)
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

    @nn.nowrap
    def initial_carry(self, batch_size: int) -> Carry:
        """The carry at the start of a text: zeros."""
        cells: Any = self._make_cells().values()
        return tuple(cell.initial_carry(batch_size) for cell in cells)


def apply_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """X [batch, time, features] times a mask [batch, features], the same at every step."""
    if mask is None:
        return x
    # Feature-major, as the recurrence has them: XLA then needs to transpose nothing.
    return (x.transpose(1, 2, 0) * mask.T).transpose(2, 0, 1)


def make_model(model: ConfigDict, vocabulary_size: int) -> LanguageModel:
    """The model that the `model` fields of a config describe."""
    return LanguageModel(vocabulary_size=vocabulary_size, **model)


def init_params(model: LanguageModel, key: jax.Array, counts: np.ndarray | None = None) -> Params:
    """Fresh parameters, initialised as Keras does.

    Uniform ±0.05 embedding, Glorot uniform kernels, orthogonal recurrent kernels, zero biases but 1
    for the forget gates and, with `initial_bias` "frequencies", the logarithms of the tokens'
    shares of the training text for the dense layer: an untrained model then predicts these.

    Args:
      model: the model.
      key: PRNG key.
      counts: how often each token stands in the training text, int [vocabulary_size]; None: the
        dense layer's bias is zero.
    """
    ids, carry = jnp.zeros((1, 1), jnp.int32), model.initial_carry(1)
    # The orthogonal kernels come from LAPACK, whose threads wait for each other by spinning: with
    # another process on the cores, 0.2 s become 15.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        params = jax.block_until_ready(jax.jit(model.init)(key, ids, carry)["params"])
    if model.initial_scale != 1:
        params = jax.tree.map(lambda x: x * model.initial_scale if x.ndim > 1 else x, params)
    if model.initial_bias == "frequencies" and counts is not None:
        # As if each token stood there once more, since none has the probability zero.
        shares = (counts + 1) / (counts + 1).sum()
        params["dense"]["bias"] = jnp.asarray(np.log(shares), jnp.float32)
    return params


def is_finite(params: Params) -> jax.Array:
    """Return whether all parameters are numbers that a model can compute with: bool []."""
    small = [(jnp.abs(array) < _LARGEST).all() for array in jax.tree.leaves(params)]
    return functools.reduce(jnp.logical_and, small)


def apply(
    model: LanguageModel,
    params: Params,
    ids: jax.typing.ArrayLike,
    carry: Carry,
    masks: Masks | None = None,
) -> tuple[jax.Array, Carry]:
    """`LanguageModel.__call__` as a pure function of the parameters."""
    outputs: Any = model.apply({"params": params}, ids, carry, masks)
    return outputs


class StepArrays(NamedTuple):
    """What `apply_step` needs of the parameters of plain LSTM layers, computed before the first step.

    Attributes:
      projected: what each token adds to the first layer's gates, [vocabulary_size, 4 * hidden].
      kernels: of each layer, [4 * hidden, n], rounded to the model's dtype; n counts its inputs
        (but for the first layer) and hidden units.
      biases: of each layer but the first, [4 * hidden, 1].
      head: the dense layer's kernel, [vocabulary_size, hidden], rounded too.
      head_bias: [vocabulary_size].
    """

    projected: jax.Array
    kernels: list[jax.Array]
    biases: list[jax.Array]
    head: jax.Array
    head_bias: jax.Array


def prepare_step(model: LanguageModel, params: Params) -> StepArrays | Params:
    """What is the same at every step; of layers that have no faster way, the parameters."""
    bound = model.bind({"params": params})
    if bound.implementation() == "scan":
        return params
    first, *others = [cell.kernels() for cell in bound.layers]
    kernels = [first.recurrent, *(jnp.concatenate([k.input, k.recurrent]) for k in others)]
    return StepArrays(
        fused.project(first, bound.embedding.embedding, model.dtype),
        [round_factor(kernel.T, model.dtype) for kernel in kernels],
        [k.bias[:, None] for k in others],
        round_factor(bound.head_kernel().T, model.dtype),
        bound.dense.bias,
    )


def apply_step(
    model: LanguageModel, arrays: StepArrays | Params, ids: jax.Array, carry: Carry
) -> tuple[jax.Array, Carry]:
    """The model for one token at a time: what `apply` computes for windows of length 1, faster.

    Args:
      model: the model.
      arrays: see `prepare_step`.
      ids: int32 [batch].
      carry: the state that reading the text so far left.

    Returns:
      Logits, float32 [batch, vocabulary_size], and the next carry.
    """
    if not isinstance(arrays, StepArrays):
        bound = model.bind({"params": arrays})
        outputs, last = bound.embedding.embedding[ids], []
        for cell, layer_carry in zip(bound.layers, carry, strict=True):
            layer_carry, outputs = cell(layer_carry, outputs)
            last.append(layer_carry)
        return bound.predict(outputs[:, None])[:, 0], tuple(last)

    states = [LSTMCarry(*(state.T for state in layer)) for layer in carry]
    added = [arrays.projected[ids].T, *arrays.biases]
    for layer, kernel in enumerate(arrays.kernels):
        inputs = states[layer].hidden
        if layer:
            inputs = jnp.concatenate([states[layer - 1].hidden, inputs])
        inputs = round_factor(inputs, model.dtype)
        _, states[layer] = fused.step(kernel, inputs, states[layer], added[layer])
    logits = matmul(arrays.head, states[-1].hidden, model.dtype).T + arrays.head_bias
    return logits, tuple(LSTMCarry(cell.T, hidden.T) for cell, hidden in states)


def make_step(
    model: LanguageModel, params: Params
) -> Callable[[jax.Array, Carry], tuple[jax.Array, Carry]]:
    """`apply_step` as a function of ids and carry alone: call this outside of the loop."""
    return functools.partial(apply_step, model, prepare_step(model, params))


def format_parameters(params: Params) -> str:
    """The shapes and counts of all parameters, with a sum for each part, as lines of text."""
    rows: list[tuple[str, str, int]] = []
    for part in sorted(params, key=lambda name: (name != "embedding", name == "dense", name)):
        arrays = params[part]
        rows.append((part, "", sum(array.size for array in arrays.values())))
        rows += [
            (f"  {name}", str(list(array.shape)), array.size) for name, array in arrays.items()
        ]
    rows.append(("total", "", sum(array.size for array in jax.tree.leaves(params))))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {shape:>14}  {count:>12,}" for name, shape, count in rows)
