"""Keras's weights: `.keras` and `.weights.h5` of Embedding, LSTM (GRU, SimpleRNN), Dense.

An LSTM's gates stand in our order, a GRU's as z, r, h where ours are r, z, n. Of a GRU's two biases
only the candidate's count twice; the others are added up.
"""

import io
import json
import re
import zipfile
from typing import Any, BinaryIO

import numpy as np

from lstm_jax.convert import weights as weights_lib
from lstm_jax.convert.weights import Weights
from lstm_jax.errors import UserError, one_line

_LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn": "SimpleRNN"}
# In an archive.
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
# What is packed takes at most so many times its size in memory, or so many bytes.
_MOST_TIMES, _SMALL = 8, 2**26
# What predicting is the same without.
_IGNORED = {"InputLayer", "Dropout", "SpatialDropout1D", "GaussianDropout", "GaussianNoise"}
_AS_HERE: dict[str, dict[str, tuple[Any, ...]]] = {
    "LSTM": {
        "activation": ("tanh",),
        "recurrent_activation": ("sigmoid",),
        "return_sequences": (True,),
        "go_backwards": (False,),
    },
    "Embedding": {"mask_zero": (False,)},
    # The probabilities are those of the logits without it.
    "Dense": {"activation": ("linear", "softmax")},
    "Activation": {"activation": ("linear", "softmax")},
    "Softmax": {},
}
_AS_HERE["GRU"] = {**_AS_HERE["LSTM"], "reset_after": (True,)}
_AS_HERE["SimpleRNN"] = {k: v for k, v in _AS_HERE["LSTM"].items() if "recurrent" not in k}


def read_archive(file: BinaryIO) -> Weights:
    """The weights in a `.keras` file.

    Of a model that is a class of its own, which only its code describes, the layers are taken to
    have Keras's default activations.

    Raises:
      UserError: if it is no such file, or holds a model that there is none of here.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            config = json.loads(_unpacked(archive, _CONFIG))
            weights = io.BytesIO(_unpacked(archive, _WEIGHTS))
        if config["class_name"] in ("Sequential", "Functional"):
            _check_layers(config["config"]["layers"], config["class_name"] == "Functional")
    except UserError:
        raise
    except Exception as error:  # A damaged archive makes zipfile and its decompressors raise much.
        raise UserError(f"it is no .keras file of Keras 3 ({one_line(error)[:200]})") from None
    return read_weights(weights)


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file in an archive, unless it is a small one that would take much memory."""
    member = archive.getinfo(name)
    with archive.open(member) as file:
        content = file.read(_MOST_TIMES * member.compress_size + _SMALL)
        if file.read(1):
            raise UserError(f"its {name} unpacks to many times its size")
    return content


def read_weights(file: BinaryIO) -> Weights:
    """The weights in a `.weights.h5` file.

    Raises:
      UserError: as `read_archive` does.
    """
    library = _library()
    try:
        with library.File(file, "r") as content:
            if "layer_names" in content.attrs or "model_weights" in content:
                raise UserError(
                    "it is a file of Keras 2: read it there, and save it with "
                    "model.save('model.keras')"
                )
            groups = _groups(content, library.Dataset)
    except UserError:
        raise
    except Exception as error:  # A damaged file makes the library raise much.
        raise UserError(f"it is no .weights.h5 file of Keras 3 ({one_line(error)[:200]})") from None
    return _from_groups(groups)


def write_archive(weights: Weights) -> bytes:
    """A `.keras` file with a Sequential model, which `keras.models.load_model` reads."""

    def layer(kind: str, **config: Any) -> dict[str, Any]:
        return {
            "module": "keras.layers",
            "class_name": kind,
            "config": config,
            "registered_name": None,
        }

    vocabulary, features = weights.embedding.shape
    layers = [
        layer("InputLayer", batch_shape=[None, None], dtype="int32", name="ids"),
        layer("Embedding", input_dim=vocabulary, output_dim=features, name="embedding"),
        *(
            layer(_LAYERS[weights.cell], units=units, return_sequences=True, name=name)
            for name, units in zip(_names(weights), weights.hidden_sizes, strict=True)
        ),
        layer("Dense", units=vocabulary, name="dense"),
    ]
    config = {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "lstm_jax", "layers": layers},
        "registered_name": None,
        "build_config": {"input_shape": [None, None]},
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(_METADATA, json.dumps({"keras_version": "3.0.0"}))
        file.writestr(_CONFIG, json.dumps(config))
        file.writestr(_WEIGHTS, write_weights(weights))
    return archive.getvalue()


def write_weights(weights: Weights) -> bytes:
    """A `.weights.h5` file, which `load_weights` of a Sequential or functional model reads."""
    arrays = {"layers/embedding/vars/0": weights.embedding}
    for name, layer in zip(_names(weights), weights.layers, strict=True):
        for number, array in enumerate(_write_layer(weights.cell, layer)):
            arrays[f"layers/{name}/cell/vars/{number}"] = array
    arrays |= {"layers/dense/vars/0": weights.kernel, "layers/dense/vars/1": weights.bias}
    content = io.BytesIO()
    with _library().File(content, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
    return content.getvalue()


def _library() -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError(
            "Keras's weights are read and written by h5py: pip install h5py, or this package with "
            "its extra 'convert'"
        ) from None
    return h5py


def _names(weights: Weights) -> list[str]:
    """What Keras calls the layers in its files."""
    name = {"rnn": "simple_rnn"}.get(weights.cell, weights.cell)
    return [f"{name}_{i}" if i else name for i in range(len(weights.layers))]


def _check_layers(layers: list[dict[str, Any]], functional: bool) -> None:
    """Raises `UserError` for the first layer of a config that computes what no layer here does."""
    names = [layer["config"]["name"] for layer in layers]
    kinds = []
    for number, layer in enumerate(layers):
        if functional and number:
            nodes = json.dumps(layer["inbound_nodes"])
            sources = re.findall(r'"keras_history": \["(.*?)", 0, (\d+)', nodes)
            if sources != [(names[number - 1], "0")]:
                raise UserError(
                    f"the layer {names[number]!r} does not read just the layer before it: only "
                    "models that are one layer after the other can be converted"
                )
        kind, config = layer["class_name"], layer["config"]
        if kind == "TimeDistributed":
            kind, config = config["layer"]["class_name"], config["layer"]["config"]
        if kind in _IGNORED:
            continue
        if kind not in _AS_HERE:
            raise UserError(f"the layer {names[number]!r} is a {kind}: there is none here")
        for field, allowed in _AS_HERE[kind].items():
            if config.get(field, allowed[0]) not in allowed:
                raise UserError(
                    f"the layer {names[number]!r} has {field}={config[field]!r}: only "
                    f"{' or '.join(map(repr, allowed))} can be converted"
                )
        kinds.append("RNN" if kind in _LAYERS.values() else kind)
    if not re.fullmatch("Embedding (RNN )+Dense( Activation| Softmax)?", " ".join(kinds)):
        raise UserError(
            f"its layers are {', '.join(kinds)}: they must be an Embedding, recurrent layers and a "
            "Dense"
        )


def _groups(file: Any, data_set: Any) -> dict[str, list[np.ndarray]]:
    """The variables of each layer or cell, by its path; the optimizer's left out.

    Raises:
      UserError: for one that is no plain array in this file.
    """
    groups: dict[str, list[np.ndarray]] = {}

    def visit(path: str, item: Any) -> None:
        parent, _, number = path.rpartition("/vars/")
        if parent and number.isdigit() and not path.startswith("optimizer"):
            if not isinstance(item, data_set):
                raise UserError(f"{path} is no array")
            if item.external or item.is_virtual:
                raise UserError(f"{path} is kept in another file")
            if item.nbytes > _MOST_TIMES * item.id.get_storage_size() + _SMALL:
                raise UserError(f"the {item.nbytes:,} bytes of {path} are not in the file")
            if item.dtype.kind != "f":
                # Dropout keeps the state of its random numbers.
                if "seed_generator" in parent:
                    return
                raise UserError(f"{parent} holds {item.dtype}, not floating-point numbers")
            groups.setdefault(parent, []).append(np.asarray(item, np.float32))

    file.visititems(visit)
    return groups


def _from_groups(groups: dict[str, list[np.ndarray]]) -> Weights:
    """The weights of a model whose layers have these variables."""
    cells = sorted((path for path in groups if path.endswith("/cell")), key=_natural)
    for path in cells:
        if "forward_layer" in path or "backward_layer" in path:
            raise UserError(f"{path}: a bidirectional layer can't predict what comes next")
    if len({re.sub(r"_?\d*/cell$", "", path) for path in cells}) > 1:
        # In a file of kinds, their difference is what is to be told.
        kinds = {path: _read_layer(groups[path], path)[0] for path in cells}
        weights_lib.find_one_cell(kinds)
        raise UserError(
            f"which of {', '.join(cells)} comes first can't be told from their names: save the "
            "model as Sequential or functional, or number the layers' names"
        )
    read = {path: _read_layer(groups[path], path) for path in cells}
    cell = weights_lib.find_one_cell({path: kind for path, (kind, _) in read.items()})
    layers = [layer for _, layer in read.values()]
    ends = {path: arrays for path, arrays in groups.items() if path not in read}
    dense = [path for path, arrays in ends.items() if [a.ndim for a in arrays] == [2, 1]]
    single = [path for path, arrays in ends.items() if [a.ndim for a in arrays] == [2]]
    if not dense and len(single) == 2:  # A dense layer without bias.
        dense = [path for path in single if "dense" in path]
        single = [path for path in single if path not in dense]
    if len(ends) != 2 or len(dense) != 1 or len(single) != 1:
        raise UserError(
            f"besides its recurrent layers it has weights in {', '.join(sorted(ends)) or 'none'}: "
            "one Embedding and one Dense are what can be converted"
        )
    (embedding,), (kernel, *bias) = ends[single[0]], ends[dense[0]]
    return weights_lib.check_weights(
        Weights(
            cell,
            embedding,
            layers,
            kernel,
            bias[0] if bias else np.zeros(kernel.shape[1], np.float32),
        )
    )


def _natural(path: str) -> list[tuple[int, str]]:
    """For sorting: lstm, lstm_1, lstm_2, ..., lstm_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _read_layer(arrays: list[np.ndarray], name: str) -> tuple[str, dict[str, np.ndarray]]:
    """The cell of a layer, and its arrays as they are here."""
    if len(arrays) not in (2, 3) or arrays[0].ndim != 2 or arrays[1].ndim != 2:
        raise UserError(f"{name} is no LSTM, GRU or SimpleRNN")
    kernel, recurrent = arrays[:2]
    cell = weights_lib.find_cell(recurrent.shape, name)
    hidden, size = recurrent.shape
    bias = arrays[2] if len(arrays) == 3 else np.zeros(size, np.float32)
    if kernel.shape[1] != size or bias.ndim > 2 or bias.shape[-1] != size:
        raise UserError(f"the arrays of {name} don't fit each other")
    if cell != "gru":
        return cell, {"input_kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
    if len(arrays) == 2:
        bias = np.zeros((2, size), np.float32)
    elif bias.shape != (2, size):
        raise UserError(f"{name} has reset_after=False: the GRU here resets after the product")
    own, other = _swap_first_two(bias)
    added = own + other
    added[-hidden:] = own[-hidden:]
    return cell, {
        "input_kernel": _swap_first_two(kernel),
        "recurrent_kernel": _swap_first_two(recurrent),
        "bias": added,
        "recurrent_bias": other[-hidden:],
    }


def _write_layer(cell: str, layer: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Kernel, recurrent kernel and bias, as Keras orders their gates."""
    arrays = [layer["input_kernel"], layer["recurrent_kernel"], layer["bias"]]
    if cell != "gru":
        return arrays
    other = np.zeros_like(layer["bias"])
    other[-len(layer["recurrent_bias"]) :] = layer["recurrent_bias"]
    arrays[2] = np.stack([layer["bias"], other])
    return [_swap_first_two(array) for array in arrays]


def _swap_first_two(array: np.ndarray) -> np.ndarray:
    """The gates r, z, n as z, r, n, and back: [..., 3 * hidden]."""
    first, second, third = np.split(array, 3, axis=-1)
    return np.concatenate([second, first, third], axis=-1)
