"""PyTorch's weights: the `state_dict` of `Embedding`, `LSTM`, `Linear`, as safetensors.

Its kernels are ours transposed and its gates stand in our order. It has two biases where one would
do: their sum is read, and one of them written (but for a GRU's candidate, where both count).
"""

import re
from typing import Any, BinaryIO

import numpy as np

from lstm_jax.convert import weights as weights_lib
from lstm_jax.convert.weights import Weights
from lstm_jax.errors import UserError, one_line

_LARGEST_HEADER = 10**8  # Bytes: the format's own limit.
# lstm.weight_ih_l0, and weight_ih of an LSTMCell.
_RECURRENT = re.compile(
    r"(?P<module>.*?)\.?(?P<name>weight|bias)_(?P<of>ih|hh)(_l(?P<layer>\d+))?(?P<reverse>_reverse)?"
)


def read_state_dict(file: BinaryIO) -> Weights:
    """The weights in a file; `nn.RNN` is taken to have its default, tanh.

    Raises:
      UserError: if it is no such file, or holds a model that there is none of here.
    """
    library = _library()
    try:
        # The file begins with the size of what describes it, and is not read if that can't be.
        start = file.read(8)
        if not 1 < int.from_bytes(start, "little") <= _LARGEST_HEADER:
            raise UserError("it is no safetensors file")
        loaded = library.load(start + file.read())
    except UserError:
        raise
    except Exception as error:  # Whatever a file that is none makes the library raise.
        raise UserError(f"it is no safetensors file ({one_line(error)[:200]})") from None
    arrays = {name: _as_float32(name, array) for name, array in loaded.items()}
    layers: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name in sorted(arrays):
        if name.rpartition(".")[2].startswith("weight_hr"):
            raise UserError(f"{name}: a projection (proj_size) has no place in the layers here")
        if found := _RECURRENT.fullmatch(name):
            if found["reverse"]:
                raise UserError(f"{name}: a bidirectional layer can't predict what comes next")
            key = found["module"], int(found["layer"] or 0)
            layers.setdefault(key, {})[f"{found['name']}_{found['of']}"] = arrays.pop(name)
    _check_order([module for module, _ in layers])
    names = sorted(layers, key=lambda key: (_number(key[0]), key))
    cells, converted = {}, []
    for key in names:
        label = f"{key[0]} (layer {key[1]})"
        cells[label], layer = _read_layer(layers[key], label)
        converted.append(layer)
    cell = weights_lib.find_one_cell(cells)
    embedding, kernel, bias = _read_ends(
        arrays, converted[0]["input_kernel"].shape[0], len(converted[-1]["recurrent_kernel"])
    )
    return weights_lib.check_weights(Weights(cell, embedding, converted, kernel, bias))


def write_state_dict(weights: Weights) -> bytes:
    """The `state_dict` of a module with `embedding`, `lstm` (or `gru`, `rnn`) and `linear`.

    Where the layers have different sizes, each is a module of its own: `lstm.0`, `lstm.1`, ...
    """
    arrays = {"embedding.weight": weights.embedding}
    one_size = len(set(weights.hidden_sizes)) == 1
    for i, layer in enumerate(weights.layers):
        other = np.zeros_like(layer["bias"])
        if weights.cell == "gru":
            other[-len(layer["recurrent_bias"]) :] = layer["recurrent_bias"]
        module, at = (weights.cell, i) if one_size else (f"{weights.cell}.{i}", 0)
        arrays |= {
            f"{module}.weight_ih_l{at}": layer["input_kernel"].T,
            f"{module}.weight_hh_l{at}": layer["recurrent_kernel"].T,
            f"{module}.bias_ih_l{at}": layer["bias"],
            f"{module}.bias_hh_l{at}": other,
        }
    arrays |= {"linear.weight": weights.kernel.T, "linear.bias": weights.bias}
    content: bytes = _library().save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"format": "pt"}
    )
    return content


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(
            "PyTorch's weights are read and written by safetensors: pip install safetensors, or "
            "this package with its extra 'convert'"
        ) from None
    return safetensors.numpy


def _as_float32(name: str, array: np.ndarray) -> np.ndarray:
    # bfloat16 is none of NumPy's own types.
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise UserError(f"{name} holds {array.dtype}, not floating-point numbers")
    return array.astype(np.float32)


def _number(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _check_order(modules: list[str]) -> None:
    """Raises `UserError` if the names of several modules don't number them."""
    if len({re.sub(r"\d+", "", module) for module in modules}) > 1:
        raise UserError(
            f"which of {', '.join(sorted(set(modules)))} comes first can't be told from their "
            "names: number them, as in lstm1 and lstm2"
        )


def _read_layer(arrays: dict[str, np.ndarray], name: str) -> tuple[str, dict[str, np.ndarray]]:
    """The cell of a layer, and its arrays as they are here."""
    if not {"weight_ih", "weight_hh"} <= set(arrays):
        raise UserError(f"{name} lacks weight_ih or weight_hh")
    cell = weights_lib.find_cell(arrays["weight_hh"].T.shape, name)
    size, hidden = arrays["weight_hh"].shape
    own, other = (arrays.get(bias, np.zeros(size, np.float32)) for bias in ("bias_ih", "bias_hh"))
    if own.shape != (size,) or other.shape != (size,):
        raise UserError(f"the biases of {name} are not of {size} numbers each")
    layer = {
        "input_kernel": arrays["weight_ih"].T,
        "recurrent_kernel": arrays["weight_hh"].T,
        "bias": own + other,
    }
    if cell == "gru":
        layer["bias"][-hidden:] = own[-hidden:]
        layer["recurrent_bias"] = other[-hidden:]
    return cell, layer


def _read_ends(
    arrays: dict[str, np.ndarray], features: int, hidden: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding [vocabulary, features], kernel [hidden, vocabulary] and bias, of what is left.

    A state_dict of tied weights may have the one matrix under one name only.
    """
    biases = {name: array for name, array in arrays.items() if array.ndim == 1}
    matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
    others = set(arrays) - set(biases) - set(matrices)
    if others or len(biases) > 1 or not 1 <= len(matrices) <= 2:
        raise UserError(
            "besides its recurrent layers it has "
            + (", ".join(f"{name} {list(array.shape)}" for name, array in sorted(arrays.items())))
            + ": one embedding and one linear layer are what can be converted"
        )
    # The linear layer has a bias beside it; else the names, then the sizes must tell.
    dense = next(iter(biases), "").removesuffix("bias") + "weight"
    if len(matrices) == 1:
        embedding = linear = next(iter(matrices.values()))
    else:
        names = sorted(matrices)
        if dense not in names:
            fits = [
                (first, last)
                for first, last in (names, names[::-1])
                if matrices[first].shape[1] == features and matrices[last].shape[1] == hidden
            ]
            named = [pair for pair in fits if "emb" in pair[0] or "encoder" in pair[0]]
            if len(named or fits) != 1:
                raise UserError(f"which of {' and '.join(names)} is the embedding can't be told")
            dense = (named or fits)[0][1]
        embedding = matrices[next(name for name in names if name != dense)]
        linear = matrices[dense]
    bias = next(iter(biases.values()), np.zeros(len(linear), np.float32))
    return embedding, linear.T, bias
