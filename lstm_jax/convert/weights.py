"""Represent weights as PyTorch's layers have them: embedding, recurrent layers, dense layer."""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lstm_jax.config import ModelConfig
from lstm_jax.errors import UserError
from lstm_jax.model import LanguageModel, Params
from lstm_jax.vocabulary import PADDING, UNKNOWN, Vocabulary

# The number of gates in the kernels of each cell that all of them support.
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


def make_layer(
    name: str,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    recurrent_bias: np.ndarray,
) -> tuple[str, Layer]:
    """Return the cell of a layer, and its arrays with one bias, or raise `UserError`.

    The kernels are as in `Weights`. The biases are [gates * hidden] each. Both are added to the
    same sum, except in the candidate of a GRU.
    """
    shape = recurrent_kernel.shape
    is_matrix = len(shape) == 2 and shape[0] > 0
    cells = [cell for cell, gates in GATES.items() if is_matrix and shape[1] == gates * shape[0]]
    if not cells:
        raise UserError(f"{name} is not an LSTM, GRU or RNN: its recurrent kernel is {list(shape)}")
    hidden, size = shape
    if not kernel.shape[1:] == bias.shape == recurrent_bias.shape == (size,):
        raise UserError(f"the shapes of the kernels and biases of {name} don't match")
    total = bias + recurrent_bias
    layer = {"input_kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": total}
    if cells == ["gru"]:
        total[-hidden:] = bias[-hidden:]
        layer["recurrent_bias"] = recurrent_bias[-hidden:]
    return cells[0], layer


def build_weights(
    layers: dict[str, tuple[str, Layer]], ends: dict[str, list[np.ndarray]]
) -> Weights:
    """Build the weights of a model, or raise `UserError` if these layers don't form one.

    The arguments are the recurrent layers by name, in any order, and the arrays of every other
    layer. The kernel of the dense layer is [vocabulary, hidden], and may also be the embedding.
    """
    if not layers:
        raise UserError("it has no recurrent layer")
    cells = {cell for cell, _ in layers.values()}
    if len(cells) > 1:
        listed = ", ".join(f"{name}: {cell}" for name, (cell, _) in layers.items())
        raise UserError(f"its layers are of several kinds ({listed}): all must be of one kind")
    if len({re.sub(r"_?\d+", "", name) for name in layers}) > 1:
        raise UserError(
            f"the names of {', '.join(sorted(layers))} don't determine their order: "
            "number them, as in lstm1 and lstm2"
        )
    ordered = [layers[name][1] for name in sorted(layers, key=_numbers)]
    features, hidden = len(ordered[0]["input_kernel"]), len(ordered[-1]["recurrent_kernel"])
    embedding, kernel, bias = _match_ends(ends, features, hidden)
    return check_weights(Weights(cells.pop(), embedding, ordered, kernel, bias))


def _numbers(name: str) -> list[list[int]]:
    """Return a key that sorts lstm, lstm_1, lstm_2, ..., lstm_10 in this order."""
    return [[int(n) for n in re.findall(r"\d{1,9}", part)] for part in re.split("[./ ]", name)]


def _match_ends(
    ends: dict[str, list[np.ndarray]], features: int, hidden: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the embedding, and the kernel and bias of the dense layer."""
    arrays = [(name, array) for name, of_layer in ends.items() for array in of_layer]
    matrices = {name: array for name, array in arrays if array.ndim == 2}
    kernels = {name: array.T for name, array in matrices.items()}
    biases = {name: array for name, array in arrays if array.ndim == 1}
    names = sorted(matrices)
    known = len(names) + len(biases) == len(arrays) and len(biases) <= 1
    if not known or len(names) not in (1, 2):
        raise UserError(
            f"its other layers with weights are {', '.join(sorted(ends)) or 'none'}: "
            "only one embedding and one dense layer can be converted"
        )

    def find_evidence(pair: tuple[str, str]) -> tuple[bool, bool, bool]:
        """Return whether the bias, the sizes and the names support this assignment."""
        embedding, dense = pair
        fits = matrices[embedding].shape[1] == features and len(kernels[dense]) == hidden
        named = "emb" in embedding or "encoder" in embedding or "dense" in dense
        return dense in biases, fits, named

    pairs = (names[0], names[-1]), (names[-1], names[0])
    embedding, dense = max(pairs, key=find_evidence)
    if len(names) > 1 and find_evidence(pairs[0]) == find_evidence(pairs[1]):
        raise UserError(f"it is not clear which of {embedding} and {dense} is the embedding")
    bias = next(iter(biases.values()), np.zeros(kernels[dense].shape[1], np.float32))
    return matrices[embedding], kernels[dense], bias


def check_weights(weights: Weights) -> Weights:
    """Return the weights, or raise `UserError` if a layer does not fit the one before it."""
    vocabulary, features = weights.embedding.shape
    for number, layer in enumerate(weights.layers, start=1):
        if (inputs := len(layer["input_kernel"])) != features:
            raise UserError(f"its recurrent layer {number} takes {inputs} features, not {features}")
        features = len(layer["recurrent_kernel"])
    if weights.kernel.shape != (features, vocabulary) or weights.bias.shape != (vocabulary,):
        raise UserError(
            f"the kernel of its dense layer is {list(weights.kernel.shape)}, not "
            f"{[features, vocabulary]}: embedding and logits must have the same vocabulary"
        )
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(weights[1:])):
        raise UserError("some of its weights are not finite")
    return weights
