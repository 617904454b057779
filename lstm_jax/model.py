"""The language model: embedding, recurrent layers, dense layer, as pure functions of parameters.

`init_params` draws parameters, `apply` runs the model over windows of text, and
`LanguageModel.apply_step`, which generation uses, over one token at a time.
"""

import dataclasses
import functools
import importlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from lstm_jax import ops
from lstm_jax.cells import CELLS, LOADED, base, import_cell
from lstm_jax.config import ModelConfig, Option
from lstm_jax.cross_entropy import compute_cross_entropy
from lstm_jax.errors import UserError
from lstm_jax.matmul import matmul, round_factor
from lstm_jax.ops import choice
from lstm_jax.ops.gates import GATINGS, Gating

Ids = Integer[Array, "batch time"]
Tokens = Integer[Array, " batch"]
Hidden = Float[Array, "batch time features"]
Logits = Float[Array, "batch time vocabulary"]
Params = dict[str, Any]

Carry = tuple[Any, ...]  # The carry of each layer, as its cell defines it.

# Dropout masks, the same at every step, or None, for the inputs of each layer and, last, for the
# outputs of the last layer. `train_step.draw_masks` draws them.
Masks = Sequence[Float[Array, "batch _"] | None]

# The activations and outputs of a layer after a step.
Record = tuple[Float[Array, "batch hidden"], Float[Array, "batch hidden"]]


_DRAWING = threading.Lock()  # BLAS's limit of threads is that of the process.
# Larger parameters count as infinite: sums of their squares overflow float32.
_LARGEST = 1e18
# The number of tokens from which `compute_cross_entropy` is faster than logits and their gradient.
_LARGE_VOCABULARY = 512


class Prepared(NamedTuple):
    """The parameters of a model, prepared for single steps."""

    params: Params
    layers: list[ops.PreparedLayer]  # Empty if the cells run themselves.
    head: Float[Array, "vocabulary features"]  # The dense layer's kernel, rounded.


class Dense(nn.Module):
    """The parameters of the layer that computes logits; if tied, it has no kernel."""

    input_size: int
    output_size: int
    is_tied: bool

    def setup(self) -> None:
        """Declare the parameters."""
        if not self.is_tied:
            shape = self.input_size, self.output_size
            self.kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        self.bias = self.param("bias", nn.initializers.zeros, (self.output_size,))


class LanguageModel(nn.Module):
    """Predicts the next token at every position; `config.ModelConfig` explains most fields.

    Parameters, cell states, softmax and loss are float32; only matmuls may have another dtype. If
    embeddings are tied, the dense layer's kernel is the embedding table, transposed (Press & Wolf
    2017; Inan et al. 2017), and the last layer has `embedding_size` hidden units.
    """

    vocabulary_size: int  # The number of tokens; ids are below it.
    embedding_size: int
    hidden_size: int
    num_layers: int = 1
    recurrence: str = "auto"
    dtype: str = "float32"  # The dtype of matmul operands, "float32" or "bfloat16".
    cell: str | type[nn.Module] = "lstm"  # A key of `cells.CELLS`, or a class.
    options: Mapping[str, Option] = nn.FrozenDict()
    block: str = "none"
    tie_embeddings: bool = False
    skip_connections: bool = False
    initial_embedding: float = 0.05
    initial_bias: str = "frequencies"
    # The id of the stop token, if texts consist of documents. Each document begins with the stop
    # token that ends the one before; this token is read from the initial carry.
    stop_id: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of features of the embedding and of the outputs of each layer."""
        last = self.embedding_size if self.tie_embeddings else self.hidden_size
        return (self.embedding_size, *[self.hidden_size] * (self.num_layers - 1), last)

    def setup(self) -> None:
        """Declare the layers."""
        bound = self.initial_embedding
        uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        self.embedding = nn.Embed(self.vocabulary_size, self.embedding_size, embedding_init=uniform)
        for i, cell in enumerate(self.make_cells()):
            setattr(self, f"{self.cell_name}_{i}", cell)  # Flax names them lstm_0, lstm_1, ...
        self.dense = Dense(self.sizes[-1], self.vocabulary_size, self.tie_embeddings)

    @property
    def cell_name(self) -> str:
        """Return the name of the kind of recurrent layer."""
        return self.cell if isinstance(self.cell, str) else self.cell.__name__

    @property
    def cell_class(self) -> type[nn.Module]:
        """Return the class of the recurrent layers."""
        return import_cell(self.cell) if isinstance(self.cell, str) else self.cell

    @property
    def gating(self) -> Gating | None:
        """Return the recurrence that `lstm_jax.ops` can run; None for other cells and blocks."""
        params: Any = vars(self.cell_class).get("layer_params")
        return GATINGS.get(params) if self.block == "none" else None

    @property
    def uses_ops(self) -> bool:
        """Return whether `lstm_jax.ops` runs the layers."""
        return self.gating is not None and self.recurrence != "scan"

    @nn.nowrap  # So that an unbound model can call it.
    def make_cells(self) -> list[nn.Module]:
        """Make the recurrent layers."""
        options: Any = {"dtype": self.dtype, "options": self.options}
        make: Any = functools.partial(base.make_cell, self.cell_class, **options)
        sizes = itertools.pairwise(self.sizes)
        if self.block == "none":
            return [make(inputs, hidden) for inputs, hidden in sizes]
        block = importlib.import_module("lstm_jax.cells.block").Block
        return [block(inputs, hidden, make(hidden, hidden), self.dtype) for inputs, hidden in sizes]

    @property
    def layers(self) -> list[nn.Module]:
        """Return the recurrent layers of a bound model."""
        return [getattr(self, f"{self.cell_name}_{i}") for i in range(self.num_layers)]

    @nn.nowrap
    def initial_carry(self, batch_size: int) -> Carry:
        """Return the carry at the start of a text."""
        carry = tuple(cell.initial_carry(batch_size) for cell in self.make_cells())
        return jax.tree.map(jnp.array, carry)  # Copies: a training step donates each array.

    def __call__(self, ids: Ids, carry: Carry) -> tuple[Logits, Carry]:
        """Predict the token after each of `ids`.

        Return logits, where logits[:, t] predict the token after ids[:, t]; and the carry after the
        last id. `carry` is the one after the preceding text, or `initial_carry`.
        """
        outputs, carry = self.run(ids, carry)
        return self.predict(outputs), carry

    def run(self, ids: Ids, carry: Carry, masks: Masks | None = None) -> tuple[Hidden, Carry]:
        """Run the recurrent layers.

        Return the outputs of the last layer, to which the last of `masks` is not applied yet, and
        the carry.
        """
        reset = self.find_resets(ids)
        below, carries = self.embedding.embedding[ids], []
        # One-hot inputs need two matmuls with `vocabulary_size` features, embedded ones three with
        # `embedding_size`.
        is_small = self.vocabulary_size <= 1.5 * self.embedding_size
        for i, (cell, state) in enumerate(zip(self.layers, carry, strict=True)):
            mask = masks[i] if masks else None
            if i == 0 and mask is None and self.uses_ops and is_small:
                inputs = jax.nn.one_hot(ids, self.vocabulary_size, dtype=below.dtype)
                options: Any = {"dtype": self.dtype, "implementation": self.recurrence}
                params = self.fold_embedding()
                state, outputs = ops.run(params, inputs, state, reset=reset, **options)
            else:
                inputs = apply_mask(below, mask)
                state, outputs = base.run_cell(cell, state, inputs, reset, self.recurrence)
            carries.append(state)
            below = outputs + below if self.skip_connections and i else outputs
        return below, tuple(carries)

    def fold_embedding(self) -> Any:
        """Return the parameters of the first layer, if it is gated, for one-hot inputs.

        Their input kernel is multiplied by the embedding table once, and the matmul of a step
        selects a row of the result. So the backward pass needs no matmul for the gradient of the
        inputs.
        """
        params = base.make_ops_params(self.layers[0])
        table = matmul(self.embedding.embedding, params.input_kernel, self.dtype)
        return params._replace(input_kernel=table)

    def run_step(
        self, ids: Tokens, carry: Carry, layers: Sequence[ops.PreparedLayer] = ()
    ) -> tuple[Float[Array, "batch features"], Carry, list[Record]]:
        """Run the recurrent layers over one token of each text.

        Return the outputs of the last layer, the next carry, and the record of each layer; with
        prepared layers, which are faster than the cells, no records.
        """
        below, carries, records = self.embedding.embedding[ids], [], []
        reset = self.find_resets(ids)
        for i, (cell, state) in enumerate(zip(self.layers, carry, strict=True)):
            if layers:
                state, outputs = layers[i].step(below if i else ids, state, reset)
            else:
                state = base.reset_carry(cell, state, reset)
                state, outputs = cell(state, below)
                records.append((base.get_activation(cell, state, outputs), outputs))
            carries.append(state)
            below = outputs + below if self.skip_connections and i else outputs
        return below, tuple(carries), records

    def predict(self, outputs: Hidden) -> Logits:
        """Return the logits for outputs of the last layer."""
        batch, time, features = outputs.shape
        # Time first, as the recurrence computes its outputs.
        rows = outputs.swapaxes(0, 1).reshape(time * batch, features)
        logits = matmul(rows, self.head_kernel(), self.dtype, self.dense.bias)
        return logits.reshape(time, batch, self.vocabulary_size).swapaxes(0, 1)

    def compute_losses(self, outputs: Hidden, targets: Ids) -> Float[Array, "batch time"]:
        """Return the cross-entropy of each target, in nats.

        It is that of the logits of `predict`; for a large vocabulary it is computed in one pass.
        """
        if self.vocabulary_size < _LARGE_VOCABULARY:
            return cross_entropy(self.predict(outputs), targets)
        kernel = self.embedding.embedding if self.tie_embeddings else self.dense.kernel
        rows = outputs.swapaxes(0, 1).reshape(-1, outputs.shape[2])
        arguments = rows, kernel, self.dense.bias, targets.T.reshape(-1)
        losses = compute_cross_entropy(*arguments, self.tie_embeddings, self.dtype)
        return losses.reshape(targets.shape[::-1]).T

    def head_kernel(self) -> Float[Array, "features vocabulary"]:
        """Return the kernel of the dense layer."""
        return self.embedding.embedding.T if self.tie_embeddings else self.dense.kernel

    @nn.nowrap
    def measure(
        self, params: Params, inputs: Ids, targets: Ids, carry: Carry
    ) -> tuple[Float[Array, "batch time"], Carry]:
        """Run the model over inputs; return the loss of each target and the carry."""
        bound = self.bind({"params": params})
        outputs, carry = bound.run(inputs, carry)
        return bound.compute_losses(outputs, targets), carry

    @nn.nowrap
    def prepare_step(self, params: Params) -> Prepared:
        """Compute what is the same at every step of `apply_step`; call it before the first."""
        bound, layers = self.bind({"params": params}), []
        if self.uses_ops:
            layers = [ops.prepare(bound.fold_embedding(), is_one_hot=True, dtype=self.dtype)]
            others = map(base.make_ops_params, bound.layers[1:])
            layers += [ops.prepare(layer, dtype=self.dtype) for layer in others]
        return Prepared(params, layers, round_factor(bound.head_kernel().T, self.dtype))

    @nn.nowrap
    def apply_step(
        self, prepared: Prepared, ids: Tokens, carry: Carry
    ) -> tuple[Float[Array, "batch vocabulary"], Carry]:
        """Run the model over one token of each text, faster than `apply`.

        Return logits and the next carry.
        """
        bound = self.bind({"params": prepared.params})
        outputs, carry, _ = bound.run_step(ids, carry, prepared.layers)
        logits = matmul(prepared.head, outputs.T, self.dtype).T + bound.dense.bias[None]
        return logits, carry

    @nn.nowrap
    def find_resets(self, ids: Integer[Array, "*shape"]) -> Bool[Array, "*shape"] | None:
        """Return at which ids a document begins; None without documents."""
        return None if self.stop_id is None else ids == self.stop_id


def apply_mask(x: Hidden, mask: Float[Array, "batch features"] | None) -> Hidden:
    """Multiply x by a mask, the same at every step."""
    return x if mask is None else x * mask[:, None]


def make_model(
    config: ModelConfig, vocabulary_size: int, stop_id: int | None = None
) -> LanguageModel:
    """Make the model that the `model` fields of a config describe, for this machine.

    The dtype "auto" is resolved by `choose_dtype`. For `stop_id`, see `LanguageModel`.

    Raises:
      KeyError: if the cell is in a file that was not loaded (`cells.load_cell`).
      UserError: if `recurrence` can't run this model here, or a user's own cell fails.
    """
    cell = config.cell if config.cell in CELLS else LOADED[config.cell]
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    fields: dict[str, Any] = {name: getattr(config, name) for name in names}
    fields |= {"cell": cell, "options": nn.FrozenDict(config.options)}
    model = LanguageModel(vocabulary_size, stop_id=stop_id, **fields)
    if config.dtype == "auto":
        cell_fields = {field.name for field in dataclasses.fields(model.cell_class)}
        dtype = choice.choose_dtype(model.uses_ops) if "dtype" in cell_fields else "float32"
        model = model.clone(dtype=dtype)
    if config.recurrence in ("xla", "c") and not model.gating:
        raise UserError(
            f"config.model.recurrence is {config.recurrence!r}, which supports only the cells "
            "lstm, peephole, gru and rnn, without a block: 'auto' supports any cell"
        )
    if config.recurrence == "c" and not choice.is_available(model.dtype):
        raise UserError(
            f"config.model.recurrence is 'c', which can't multiply in {model.dtype} here: choose "
            "'auto'"
        )
    if not isinstance(model.cell, str):
        with base.name_cell_error(model.cell_class):
            jax.eval_shape(functools.partial(_run_both, model), jax.random.key(0))
    return model


def _run_both(model: LanguageModel, key: Array) -> Any:
    """Run a model with new parameters over two tokens: over one at a time, and over both."""
    ids, carry = jnp.zeros((1, 2), jnp.int32), model.initial_carry(1)
    bound = model.bind({"params": model.init(key, ids, carry)["params"]})
    return bound.run_step(ids[:, 0], carry), bound(ids, carry)


def init_params(
    model: LanguageModel, key: Array, counts: Integer[np.ndarray, " vocabulary"] | None = None
) -> Params:
    """Draw initial parameters, as Keras does except for the bias of the dense layer.

    With `initial_bias` "frequencies", an untrained model predicts the frequencies of the tokens in
    the training text, which are in proportion to `counts`. Without those, that bias is zero.
    """
    # LAPACK makes the orthogonal kernels. Its threads spin while they wait for each other: if
    # another process occupies the cores, 0.2 s become 15 s.
    with _DRAWING, threadpoolctl.threadpool_limits(1, user_api="blas"):
        params = jax.block_until_ready(_draw_params(model, key))
    if model.initial_bias == "frequencies" and counts is not None:
        # Add-one smoothing, so that no token has probability zero.
        frequencies = (counts + 1) / (counts + 1).sum()
        params["dense"]["bias"] = jnp.asarray(np.log(frequencies), jnp.float32)
    return params


def get_param_shapes(model: LanguageModel) -> Any:
    """Return the shapes and dtypes of the parameters, as a tree like theirs."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@jax.jit(static_argnames="model")
def _draw_params(model: LanguageModel, key: Array) -> Params:
    return model.init(key, jnp.zeros((1, 1), jnp.int32), model.initial_carry(1))["params"]


@jax.jit(static_argnames=("model", "batch_size"), keep_unused=True)
def first_carry(model: LanguageModel, params: Params, batch_size: int) -> Carry:
    """Return `model.initial_carry` as a result of jit, so that it is placed like the parameters.

    Otherwise, a function that reads a text chunk by chunk would be compiled twice: for this first
    carry, and for the carries that it returns itself.
    """
    return model.initial_carry(batch_size)


def is_finite(arrays: Any) -> Bool[Array, ""]:
    """Return whether all numbers of a tree are finite, and small enough to compute with."""
    small = jax.tree.map(lambda x: (jnp.abs(x) < _LARGEST).all(), arrays)
    return jax.tree.reduce(jnp.logical_and, small)


def apply(
    model: LanguageModel, params: Params, ids: Integer[ArrayLike, "batch time"], carry: Carry
) -> tuple[Logits, Carry]:
    """Run the model over ids; see `LanguageModel.__call__`."""
    results: Any = model.apply({"params": params}, jnp.asarray(ids), carry)
    return results
