"""Read and write PyTorch's weights: the `state_dict` of Embedding, LSTM (GRU, RNN), Linear.

PyTorch's kernels are transposed; its gates have the order of `lstm_jax.cells`. Files are
safetensors.
"""

import importlib
import re
import types
from typing import BinaryIO

import numpy as np

from lstm_jax.convert import weights as weights_lib
from lstm_jax.convert.weights import Weights
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
    ends: dict[str, list[np.ndarray]] = {}
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
        else:
            ends.setdefault(module, []).append(array.astype(np.float32))
    made = {}
    for name, arrays in layers.items():
        if not {"weight_ih", "weight_hh"} <= set(arrays):
            raise UserError(f"{name} lacks weight_ih or weight_hh")
        zeros = np.zeros(arrays["weight_hh"].shape[:1], np.float32)
        biases = [arrays.get(key, zeros) for key in ("bias_ih", "bias_hh")]
        kernels = arrays["weight_ih"].T, arrays["weight_hh"].T
        made[name] = weights_lib.make_layer(name, *kernels, *biases)
    return weights_lib.build_weights(made, ends)


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
