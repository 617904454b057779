"""The weights of a model as other libraries have them too: embedding, recurrent layers, dense."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lstm_jax.errors import UserError
from lstm_jax.model import LanguageModel, Params
from lstm_jax.vocabulary import PADDING, SPECIAL_IDS, UNKNOWN, Vocabulary

# How many gates stand side by side in the kernels of each cell that others have as well.
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
# What a row that the other library did not have adds to the logits: as good as never.
_NEVER = -30.0


class Weights(NamedTuple):
    """Float32 arrays, the layers' as `cells` names them and orders their gates.

    Attributes:
      cell: one of `GATES`.
      embedding: [vocabulary, features].
      layers: `input_kernel` [inputs, gates * hidden], `recurrent_kernel` [hidden, gates * hidden],
        `bias` [gates * hidden] and, of a GRU, `recurrent_bias` [hidden]; the first layer first.
      kernel: of the dense layer, [hidden, vocabulary].
      bias: of the dense layer, [vocabulary].
    """

    cell: str
    embedding: np.ndarray
    layers: list[dict[str, np.ndarray]]
    kernel: np.ndarray
    bias: np.ndarray

    @property
    def hidden_sizes(self) -> list[int]:
        """Units of each layer."""
        return [len(layer["recurrent_kernel"]) for layer in self.layers]


def from_model(model: LanguageModel, params: Params) -> Weights:
    """The weights of a model; a kernel that is tied to the embedding is written out.

    Raises:
      UserError: if other libraries have no such model.
    """
    if model.cell not in GATES:
        raise UserError(f"model.cell is {model.cell!r}: Keras and PyTorch have no such layer")
    if model.layer_norm:
        raise UserError("model.layer_norm is on: Keras and PyTorch have no such layer")
    arrays: Any = {
        part: {name: np.asarray(array, np.float32) for name, array in of_part.items()}
        for part, of_part in params.items()
    }
    embedding = arrays["embedding"]["embedding"]
    return Weights(
        model.cell,
        embedding,
        [arrays[f"{model.cell}_{i}"] for i in range(model.num_layers)],
        embedding.T if model.tie_embeddings else arrays["dense"]["kernel"],
        arrays["dense"]["bias"],
    )


def to_model(weights: Weights) -> tuple[dict[str, Any], Params]:
    """The `model` fields of a config, and the parameters.

    The embedding is tied where the dense layer's kernel is the same matrix.

    Raises:
      UserError: if the layers have sizes that no config describes.
    """
    sizes = weights.hidden_sizes
    tied = np.array_equal(weights.embedding.T, weights.kernel)
    if len(set(sizes[:-1] if tied else sizes)) > 1:
        raise UserError(
            f"its layers have {', '.join(map(str, sizes))} units: all layers of a model have as "
            "many here"
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


def check_weights(weights: Weights) -> Weights:
    """The same weights; raises `UserError` where one layer does not fit the one before it."""
    vocabulary, features = weights.embedding.shape
    for number, layer in enumerate(weights.layers):
        inputs, hidden = len(layer["input_kernel"]), len(layer["recurrent_kernel"])
        if inputs != features:
            raise UserError(
                f"its recurrent layer {number + 1} takes {inputs} features, and what comes before "
                f"it gives {features}"
            )
        size = GATES[weights.cell] * hidden
        shapes = {
            "input_kernel": (inputs, size),
            "recurrent_kernel": (hidden, size),
            "bias": (size,),
            "recurrent_bias": (hidden,),
        }
        for name, array in layer.items():
            if array.shape != shapes[name]:
                raise UserError(
                    f"the {name} of its recurrent layer {number + 1} has the shape "
                    f"{list(array.shape)}, not {list(shapes[name])}"
                )
        features = hidden
    if weights.kernel.shape != (features, vocabulary) or weights.bias.shape != (vocabulary,):
        raise UserError(
            f"its embedding has {vocabulary} rows and its last layer {features} units, and the "
            f"dense layer goes from {weights.kernel.shape[0]} units to {weights.kernel.shape[1]} "
            "logits: embedding and logits must be of the same vocabulary"
        )
    arrays = [weights.embedding, weights.kernel, weights.bias]
    arrays += [array for layer in weights.layers for array in layer.values()]
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError("some of its weights are not finite")
    return weights


def with_vocabulary(
    weights: Weights, units: Sequence[str], kind: str, stop: str
) -> tuple[Weights, Vocabulary, list[str]]:
    """Weights whose rows 0 and 1 are those of "" and "[UNK]", their vocabulary, and what was added.

    A row that the model did not have is added: zeros, and logits of next to no probability.

    Args:
      weights: of a model made anywhere.
      units: the text of its ids. Where "" or "[UNK]" are among them, the model may lack "", or
        both, and have "[UNK]" first otherwise, as Keras's StringLookup does.
      kind: see `Vocabulary`.
      stop: likewise.

    Raises:
      UserError: if there are more or fewer units than rows, or they make no vocabulary.
    """
    proper = [unit for unit in units if unit not in (PADDING, UNKNOWN)]
    orders = [list(units), [UNKNOWN, *proper], proper]
    rows = len(weights.embedding)
    order = next((order for order in orders if len(order) == rows), None)
    if order is None:
        raise UserError(
            f"the model has {rows} units, and the vocabulary {len(proper)} besides '' and "
            f"{UNKNOWN!r}: name the vocabulary that it was trained with"
        )
    try:
        vocabulary = Vocabulary([PADDING, UNKNOWN, *proper], kind, stop)
    except ValueError as error:
        raise UserError(f"the vocabulary can't be used: {error}") from None
    at = {unit: row for row, unit in enumerate(order)}
    picked = [at.get(unit, rows) for unit in vocabulary.tokens]  # `rows` is the row that is added.
    added = [unit for unit in vocabulary.tokens if unit not in at]
    embedding = np.pad(weights.embedding, ((0, 1), (0, 0)))[picked]
    kernel = np.pad(weights.kernel, ((0, 0), (0, 1)))[:, picked]
    bias = np.append(weights.bias, np.float32(_NEVER))[picked]
    return weights._replace(embedding=embedding, kernel=kernel, bias=bias), vocabulary, added


def without_special(weights: Weights) -> Weights:
    """The same without the rows of "" and "[UNK]", for a model whose vocabulary has neither."""
    first = len(SPECIAL_IDS)
    return weights._replace(
        embedding=weights.embedding[first:],
        kernel=weights.kernel[:, first:],
        bias=weights.bias[first:],
    )


def find_cell(shape: Sequence[int], name: str) -> str:
    """The cell whose recurrent kernel has such a shape, or `UserError`.

    Args:
      shape: [hidden, gates * hidden].
      name: of the layer, for the error.
    """
    for cell, gates in GATES.items():
        if len(shape) == 2 and shape[0] and shape[1] == gates * shape[0]:
            return cell
    raise UserError(
        f"{name} has a recurrent kernel of shape {list(shape)}: it is no LSTM, GRU or simple RNN"
    )


def find_one_cell(cells: Mapping[str, str]) -> str:
    """The cell of all layers, given by name; raises `UserError` if they are of several kinds."""
    if not cells:
        raise UserError("it has no recurrent layer")
    if len(set(cells.values())) > 1:
        listed = ", ".join(f"{name}: {cell}" for name, cell in cells.items())
        raise UserError(f"its layers are of several kinds ({listed}): here all are of one")
    return next(iter(cells.values()))
