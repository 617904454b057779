"""Read and write PyTorch's weights: the `state_dict` of Embedding, LSTM (GRU, RNN), Linear.

PyTorch's kernels are transposed; its gates have the order of `lstm_jax.cells`. Files are
safetensors.
"""

import importlib
import re
import types
from typing import BinaryIO

import jax
import numpy as np

from lstm_jax.convert.weights import GATES, Layer, Weights
from lstm_jax.errors import UserError, one_line

_MAX_HEADER_BYTES = 10**8  # The limit of the format itself.
# lstm.weight_ih_l0, or weight_ih of an LSTMCell.
_RECURRENT = re.compile(r"(.*?)\.?((?:weight|bias)_[ih]h)(?:_l(\d{1,9}))?(_reverse)?")


def read_state_dict(file: BinaryIO) -> Weights:
    """Return the weights in a file, or raise `UserError` if they can't be converted.

    An `nn.RNN` is assumed to have its default activation, tanh.
    """
    library = _import_safetensors()
    # The file begins with the size of its header. If that is impossible, don't read the rest.
    start = file.read(8)
    if not 1 < int.from_bytes(start, "little") <= _MAX_HEADER_BYTES:
        raise UserError("it is not a safetensors file")
    try:
        loaded = library.load(start + file.read())
    except KeyError as error:  # NumPy has no bfloat16.
        raise UserError(f"NumPy can't read its arrays ({error}): save them as float32") from None
    except Exception as error:  # It raises many kinds for a damaged file.
        raise UserError(f"it is not a safetensors file ({one_line(error)[:200]})") from None
    layers: dict[str, dict[str, np.ndarray]] = {}
    ends: list[tuple[str, np.ndarray]] = []
    for name, array in loaded.items():
        if array.dtype.kind != "f":
            raise UserError(f"{name} contains {array.dtype}, not floating-point numbers")
        module, _, attribute = name.rpartition(".")
        if attribute.startswith("weight_hr"):
            raise UserError(f"{name}: a layer with a projection (proj_size) can't be converted")
        if match := _RECURRENT.fullmatch(name):
            module, attribute, layer, reverse = match.groups()
            if reverse:
                raise UserError(f"{name}: a bidirectional layer can't predict the next token")
            arrays = layers.setdefault(f"{module} (layer {layer or 0})", {})
            arrays[attribute] = array.astype(np.float32)
        elif array.ndim == 1 and attribute != "bias":  # Such as the scale of a normalization.
            raise UserError(f"{name} is of a layer that can't be converted")
        else:
            ends.append((module, array.astype(np.float32)))
    made = {name: _make_layer(name, arrays) for name, arrays in layers.items()}
    return _build_weights(made, ends)


def _make_layer(name: str, arrays: Layer) -> tuple[str, Layer]:
    """Return the cell of a layer, and its arrays as in `Weights`, or raise `UserError`.

    PyTorch adds both biases to the same sum, except in the candidate of a GRU.
    """
    if not {"weight_ih", "weight_hh"} <= set(arrays):
        raise UserError(f"{name} lacks weight_ih or weight_hh")
    kernel, recurrent_kernel = arrays["weight_ih"].T, arrays["weight_hh"].T
    shape = recurrent_kernel.shape
    zeros = np.zeros(shape[-1:], np.float32)
    bias, recurrent_bias = (arrays.get(key, zeros) for key in ("bias_ih", "bias_hh"))
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


def _build_weights(
    layers: dict[str, tuple[str, Layer]], ends: list[tuple[str, np.ndarray]]
) -> Weights:
    """Build the weights of a model, or raise `UserError` if these layers don't form one.

    The arguments are the recurrent layers by name, in any order, and each array of the other layers
    with its layer's name. The kernel of the dense layer is [vocabulary, hidden], and may also be
    the embedding.
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
    hidden = len(ordered[-1]["recurrent_kernel"])
    embedding, kernel, bias = _match_ends(ends, len(ordered[0]["input_kernel"]), hidden)
    features = embedding.shape[1]
    for number, layer in enumerate(ordered, start=1):
        if (inputs := len(layer["input_kernel"])) != features:
            raise UserError(f"its recurrent layer {number} takes {inputs} features, not {features}")
        features = len(layer["recurrent_kernel"])
    if kernel.shape != (hidden, len(embedding)) or bias.shape != (len(embedding),):
        raise UserError(
            f"the kernel of its dense layer is {list(kernel.shape)}, not "
            f"{[hidden, len(embedding)]}: embedding and logits must have the same vocabulary"
        )
    weights = Weights(cells.pop(), embedding, ordered, kernel, bias)
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(weights[1:])):
        raise UserError("some of its weights are not finite")
    return weights


def _numbers(name: str) -> list[list[int]]:
    """Return a key that sorts lstm.0, lstm.1, ..., lstm.10 in this order."""
    return [[int(n) for n in re.findall(r"\d{1,9}", part)] for part in re.split("[. ]", name)]


def _match_ends(
    ends: list[tuple[str, np.ndarray]], features: int, hidden: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the embedding, and the kernel and bias of the dense layer."""
    matrices = {name: array for name, array in ends if array.ndim == 2}
    biases = {name: array for name, array in ends if array.ndim == 1}
    names = sorted(matrices)
    known = len(names) + len(biases) == len(ends) and len(biases) <= 1
    if not known or len(names) not in (1, 2):
        raise UserError(
            f"its other layers with weights are {', '.join(sorted(dict(ends))) or 'none'}: "
            "only one embedding and one dense layer can be converted"
        )

    def find_evidence(pair: tuple[str, str]) -> tuple[bool, bool, bool]:
        """Return whether the bias, the sizes and the names support this assignment."""
        embedding, dense = pair
        fits = matrices[embedding].shape[1] == features and matrices[dense].shape[1] == hidden
        named = "emb" in embedding or "encoder" in embedding or "dense" in dense
        return dense in biases, fits, named

    pairs = (names[0], names[-1]), (names[-1], names[0])
    embedding, dense = max(pairs, key=find_evidence)
    if len(names) > 1 and find_evidence(pairs[0]) == find_evidence(pairs[1]):
        raise UserError(f"it is not clear which of {embedding} and {dense} is the embedding")
    bias = next(iter(biases.values()), np.zeros(len(matrices[dense]), np.float32))
    return matrices[embedding], matrices[dense].T, bias


def write_state_dict(weights: Weights) -> bytes:
    """Return the `state_dict` of a module with `embedding`, `lstm` (or `gru`, `rnn`) and `linear`.

    Layers of different sizes become separate modules: `lstm.0`, `lstm.1`, ...
    """
    library = _import_safetensors()
    one_size = len(set(weights.hidden_sizes)) == 1
    arrays = {"embedding.weight": weights.embedding}
    for i, layer in enumerate(weights.layers):
        module, number = (weights.cell, i) if one_size else (f"{weights.cell}.{i}", 0)
        bias = layer["bias"]
        recurrent_bias = np.zeros_like(bias)
        if "recurrent_bias" in layer:  # Of the candidate of a GRU.
            recurrent_bias[-len(layer["recurrent_bias"]) :] = layer["recurrent_bias"]
        arrays |= {
            f"{module}.weight_ih_l{number}": layer["input_kernel"].T,
            f"{module}.weight_hh_l{number}": layer["recurrent_kernel"].T,
            f"{module}.bias_ih_l{number}": bias,
            f"{module}.bias_hh_l{number}": recurrent_bias,
        }
    arrays |= {"linear.weight": weights.kernel.T, "linear.bias": weights.bias}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(library.save(contiguous, {"format": "pt"}))


def _import_safetensors() -> types.ModuleType:
    """Import and return `safetensors.numpy`, or raise `UserError`."""
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        raise UserError("this format needs safetensors: pip install 'lstm-jax[convert]'") from None
