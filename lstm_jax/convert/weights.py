"""The weights of a model that can be converted: embedding, recurrent layers, dense layer."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lstm_jax.config import ModelConfig
from lstm_jax.errors import UserError
from lstm_jax.model import LanguageModel, Params
from lstm_jax.vocabulary import PADDING, UNKNOWN, Vocabulary

# The number of gates in the kernels of each cell that can be converted.
GATES = {"lstm": 4, "gru": 3, "rnn": 1}

Layer = dict[str, np.ndarray]


class Weights(NamedTuple):
    """Float32 arrays. Layers have the names and the gate order of `lstm_jax.cells`."""

    cell: str  # One of `GATES`.
    embedding: np.ndarray  # [vocabulary, features].
    # `input_kernel` [inputs, gates * hidden], `recurrent_kernel` [hidden, gates * hidden], `bias`
    # [gates * hidden] and, of a GRU, `recurrent_bias` [hidden]; the first layer first.
    layers: list[Layer]
    kernel: np.ndarray  # Of the dense layer, [hidden, vocabulary].
    bias: np.ndarray  # Of the dense layer, [vocabulary].

    @property
    def hidden_sizes(self) -> list[int]:
        """Return the number of hidden units of each layer."""
        return [len(layer["recurrent_kernel"]) for layer in self.layers]


def check_model(model: ModelConfig) -> None:
    """Raise `UserError` if PyTorch has no layers with these `model` fields of a config."""
    allowed: dict[str, Collection[Any]] = {
        "cell": GATES,
        "layer_norm": [False],
        "block": ["none"],
        "skip_connections": [False],
    }
    for field, values in allowed.items():
        if (value := getattr(model, field)) not in values:
            raise UserError(f"PyTorch has no layer with model.{field}={value!r}")


def from_model(model: LanguageModel, params: Params) -> Weights:
    """Return the weights of a model that passes `check_model`."""
    arrays: Params = jax.tree.map(lambda array: np.asarray(array, np.float32), params)
    embedding = arrays["embedding"]["embedding"]
    return Weights(
        model.cell_name,
        embedding,
        [arrays[f"{model.cell}_{i}"] for i in range(model.num_layers)],
        embedding.T if model.tie_embeddings else arrays["dense"]["kernel"],
        arrays["dense"]["bias"],
    )


def to_model(weights: Weights) -> tuple[dict[str, object], Params]:
    """Return the `model` fields of a config, and the parameters, or raise `UserError`.

    Embeddings are tied if the kernel of the dense layer is the embedding, transposed.
    """
    sizes = weights.hidden_sizes
    tied = np.array_equal(weights.embedding.T, weights.kernel)
    if len(set(sizes[:-1] if tied else sizes)) > 1:
        raise UserError(
            f"its layers have {', '.join(map(str, sizes))} hidden units: all layers must have the "
            "same number"
        )
    fields = {
        "cell": weights.cell,
        "embedding_size": weights.embedding.shape[1],
        "hidden_size": sizes[0],
        "num_layers": len(sizes),
        "tie_embeddings": tied,
    }
    dense = {"bias": weights.bias} if tied else {"kernel": weights.kernel, "bias": weights.bias}
    layers = {f"{weights.cell}_{i}": layer for i, layer in enumerate(weights.layers)}
    return fields, {"embedding": {"embedding": weights.embedding}, **layers, "dense": dense}


def add_special_rows(
    weights: Weights, tokens: Sequence[str], kind: str, stop: str
) -> tuple[Weights, Vocabulary, list[str]]:
    """Make "" and "[UNK]" rows 0 and 1; return the weights, the vocabulary, and the added tokens.

    Rows that the model lacks are added, with logits of -30. Even if `tokens`, by id, include "" or
    "[UNK]", the model may lack "" or both, and may have "[UNK]" first. Raise `UserError` if the
    number of tokens does not fit the model.
    """
    proper = [token for token in tokens if token not in (PADDING, UNKNOWN)]
    orders = [list(tokens), [UNKNOWN, *proper], proper]
    rows = len(weights.embedding)
    order = next((order for order in orders if len(order) == rows), None)
    if order is None:
        raise UserError(
            f"the model has {rows} tokens, but the vocabulary has {len(proper)} apart from '' and "
            f"{UNKNOWN!r}: name the vocabulary that it was trained with"
        )
    try:
        vocabulary = Vocabulary([PADDING, UNKNOWN, *proper], kind, stop)
    except ValueError as error:
        raise UserError(f"the vocabulary can't be used: {error}") from None
    row_of = {token: row for row, token in enumerate(order)}
    added = [token for token in vocabulary.tokens if token not in row_of]
    picked = [row_of.get(token, rows) for token in vocabulary.tokens]  # Row `rows` is the new one.
    embedding = np.pad(weights.embedding, ((0, 1), (0, 0)))[picked]
    kernel = np.pad(weights.kernel, ((0, 0), (0, 1)))[:, picked]
    bias = np.append(weights.bias, np.float32(-30))[picked]  # In effect, never predicted.
    return weights._replace(embedding=embedding, kernel=kernel, bias=bias), vocabulary, added
