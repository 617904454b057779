"""Convert a model from and to a `state_dict` of PyTorch: an Embedding, an LSTM or GRU, a Linear.

PyTorch's kernels are transposed; its gates have the order of `lstm_jax.cells`. Files are
safetensors.
"""

import importlib
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import ops
from lstm_jax.config import ModelConfig
from lstm_jax.errors import UserError, name_failure, one_line
from lstm_jax.model import LanguageModel, Params
from lstm_jax.ops import weights
from lstm_jax.vocabulary import PADDING, UNKNOWN, Vocabulary

# The cells that can be converted, with the number of gates in their kernels.
_GATES = {"lstm": 4, "gru": 3}
_PARAMS: dict[str, type[Any]] = {"lstm": ops.LSTMParams, "gru": ops.GRUParams}

StateDict = dict[str, np.ndarray]


class Modules(NamedTuple):
    """The names of the modules in a `state_dict`."""

    embedding: str
    recurrent: str
    linear: str


def read_file(path: Path) -> StateDict:
    """Return the arrays of a safetensors file in float32; raise `UserError` if it has others."""
    library = _import_safetensors()
    try:
        with name_failure(f"can't read {path}"):
            arrays: StateDict = library.load_file(path)
    except UserError:
        raise
    except Exception as error:  # It raises many kinds for a damaged file.
        raise UserError(f"it is not a safetensors file ({one_line(error)[:200]})") from None
    made = {name: array.astype(np.float32) for name, array in arrays.items()}
    for name, array in made.items():
        if not (jnp.issubdtype(arrays[name].dtype, jnp.floating) and np.isfinite(array).all()):
            raise UserError(f"{name} contains other numbers than finite floating-point ones")
    return made


def to_bytes(arrays: StateDict) -> bytes:
    """Return the content of a safetensors file with these arrays."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(_import_safetensors().save(contiguous, {"format": "pt"}))


def _import_safetensors() -> types.ModuleType:
    """Return safetensors.numpy; raise `UserError` if the package is missing."""
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        raise UserError(
            "PyTorch's weights need the package safetensors: pip install 'lstm-jax[convert]'"
        ) from None


def find_modules(arrays: StateDict, names: Sequence[str] = ()) -> Modules:
    """Return the modules with these names, else `embedding`, `lstm` or `gru`, and `linear`."""
    cell = "gru" if "gru.weight_hh_l0" in arrays else "lstm"
    return Modules(*(names or ("embedding", cell, "linear")))


def to_model(arrays: StateDict, modules: Modules) -> tuple[dict[str, object], Params]:
    """Return the `model` fields of a config, and the parameters.

    Biases may be missing. Embeddings are tied if the kernel of the dense layer is the embedding, or
    if only one of the two is there.

    Raises:
      UserError: if an array is missing, has another shape, or is of another module.
    """
    arrays, (embedding, recurrent, linear) = dict(arrays), modules
    tables = [f"{embedding}.weight", f"{linear}.weight"]
    for name, other in (tables, tables[::-1]):
        if other in arrays:
            arrays.setdefault(name, arrays[other])

    hint = (
        "a model is an Embedding, an LSTM or GRU in one direction, and a Linear, whose names are "
        f"{', '.join(modules)} (--modules)"
    )
    for name in (tables[0], f"{recurrent}.weight_hh_l0"):
        if name not in arrays or arrays[name].ndim != 2:
            raise UserError(f"it has no matrix {name}: {hint}")
    vocabulary, features = arrays[tables[0]].shape
    size, hidden = arrays[f"{recurrent}.weight_hh_l0"].shape
    cell = "gru" if size == 3 * hidden else "lstm"
    num_layers = sum(name.startswith(f"{recurrent}.weight_hh_l") for name in arrays)
    shapes = _list_shapes(modules, cell, vocabulary, features, hidden, num_layers)
    for name, shape in shapes.items():
        if len(shape) == 1:
            arrays.setdefault(name, np.zeros(shape, np.float32))
    for name in sorted(shapes.keys() | arrays.keys()):
        found = arrays[name].shape if name in arrays else None
        if found != shapes.get(name):
            needed = _describe(shapes.get(name))
            raise UserError(f"{name} is {_describe(found)}, and must be {needed}: {hint}")
    params: Params = {"embedding": {"embedding": arrays[tables[0]]}}
    for i in range(num_layers):
        layer = weights.from_torch(arrays, f"l{i}", f"{recurrent}.")
        params[f"{cell}_{i}"] = jax.tree.map(np.asarray, layer._asdict())
    params["dense"] = {"bias": arrays[f"{linear}.bias"]}
    tied = np.array_equal(arrays[tables[0]], arrays[tables[1]])
    if not tied:
        params["dense"]["kernel"] = arrays[tables[1]].T
    fields = {
        "cell": cell,
        "embedding_size": features,
        "hidden_size": hidden,
        "num_layers": num_layers,
        "tie_embeddings": tied,
    }
    return fields, params


def _list_shapes(
    modules: Modules, cell: str, vocabulary: int, features: int, hidden: int, num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of a `state_dict`, by name."""
    size = _GATES[cell] * hidden
    shapes: dict[str, tuple[int, ...]] = {f"{modules.embedding}.weight": (vocabulary, features)}
    for i in range(num_layers):
        shapes[f"{modules.recurrent}.weight_ih_l{i}"] = size, hidden if i else features
        shapes[f"{modules.recurrent}.weight_hh_l{i}"] = size, hidden
        shapes[f"{modules.recurrent}.bias_ih_l{i}"] = (size,)
        shapes[f"{modules.recurrent}.bias_hh_l{i}"] = (size,)
    shapes[f"{modules.linear}.weight"] = vocabulary, hidden
    shapes[f"{modules.linear}.bias"] = (vocabulary,)
    return shapes


def _describe(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def check_model(model: ModelConfig) -> None:
    """Raise `UserError` if PyTorch has no layers with these `model` fields of a config."""
    last = model.embedding_size if model.tie_embeddings else model.hidden_size
    allowed: dict[str, Collection[Any]] = {
        "cell": _GATES,
        "layer_norm": [False],
        "block": ["none"],
        "skip_connections": [False],
        "tie_embeddings": [False, last == model.hidden_size or model.num_layers == 1],
    }
    for field, values in allowed.items():
        if (value := getattr(model, field)) not in values:
            raise UserError(f"PyTorch has no layers with model.{field}={value!r}")


def from_model(model: LanguageModel, params: Params, first: int = 0) -> StateDict:
    """Return the `state_dict` of a model that passes `check_model`, with the tokens from `first`.

    The names of the modules are `embedding`, `lstm` or `gru`, and `linear`.
    """
    own: Params = jax.tree.map(lambda array: np.asarray(array, np.float32), params)
    table = own["embedding"]["embedding"]
    arrays: StateDict = {"embedding.weight": table[first:]}
    for i in range(model.num_layers):
        layer = _PARAMS[str(model.cell)](**own[f"{model.cell}_{i}"])
        arrays |= weights.to_torch(layer, f"l{i}", f"{model.cell}.")
    kernel = table if model.tie_embeddings else own["dense"]["kernel"].T
    return arrays | {"linear.weight": kernel[first:], "linear.bias": own["dense"]["bias"][first:]}


def add_special_rows(
    params: Params, tokens: Sequence[str], kind: str, stop: str
) -> tuple[Params, Vocabulary, list[str]]:
    """Make "" and "[UNK]" rows 0 and 1; return parameters, vocabulary, and the added tokens.

    Rows that the model lacks are added, with logits of -30. `tokens` are those of its rows; they
    may also include "" and "[UNK]" if the model has neither. Raise `UserError` if the number of
    tokens does not fit the model.
    """
    table, dense = params["embedding"]["embedding"], params["dense"]
    proper = [token for token in tokens if token not in (PADDING, UNKNOWN)]
    rows = list(tokens) if len(tokens) == len(table) else proper
    if len(rows) != len(table):
        raise UserError(
            f"the model has {len(table)} tokens, but the vocabulary has {len(proper)} apart from "
            f"'' and {UNKNOWN!r}: name the vocabulary that it was trained with"
        )
    try:
        vocabulary = Vocabulary([PADDING, UNKNOWN, *proper], kind, stop)
    except ValueError as error:
        raise UserError(f"the vocabulary can't be used: {error}") from None
    row_of = {token: row for row, token in enumerate(rows)}
    added = [token for token in vocabulary.tokens if token not in row_of]
    # The row after the last is the new one.
    picked = [row_of.get(token, len(rows)) for token in vocabulary.tokens]
    made = {"bias": np.append(dense["bias"], np.float32(-30))[picked]}  # In effect, never drawn.
    if "kernel" in dense:
        made["kernel"] = np.pad(dense["kernel"], ((0, 0), (0, 1)))[:, picked]
    embedding = np.pad(table, ((0, 1), (0, 0)))[picked]
    return {**params, "embedding": {"embedding": embedding}, "dense": made}, vocabulary, added
