"""Read and write the weights of Keras 3 in .keras and .weights.h5 files.

Keras has the gates of an LSTM in the order of `lstm_jax.cells`, and those of a GRU in the order
z, r, n instead of r, z, n.
"""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from lstm_jax.convert import weights as weights_lib
from lstm_jax.convert.weights import Layer, Weights
from lstm_jax.errors import UserError

_GRU = (1, 0, 2)  # The order of the gates, from and to that of `lstm_jax.cells`.
_CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn": "SimpleRNN"}
# Limits in bytes of what an archive's files unpack to: the config, and the weights as a multiple of
# the archive (Keras doesn't compress them), plus bytes beyond.
_CONFIG_LIMIT, _MAX_RATIO, _SMALL = 2**20, 8, 2**26
# Layers without effect at prediction.
_IGNORED = {"InputLayer", "Dropout", "SpatialDropout1D", "GaussianDropout", "GaussianNoise"}
# For each supported class, the values of its fields that can be converted.
_RECURRENT = {"activation": ("tanh",), "return_sequences": (True,), "go_backwards": (False,)}
_SUPPORTED: dict[str, Mapping[str, tuple[object, ...]]] = {
    "LSTM": {**_RECURRENT, "recurrent_activation": ("sigmoid",)},
    "GRU": {**_RECURRENT, "recurrent_activation": ("sigmoid",), "reset_after": (True,)},
    "SimpleRNN": _RECURRENT,
    "Embedding": {"mask_zero": (False,)},
    # A softmax does not change the probabilities that follow from the logits.
    "Dense": {"activation": ("linear", "softmax")},
    "Activation": {"activation": ("linear", "softmax")},
    "Softmax": {},
}


def read_archive(file: BinaryIO) -> Weights:
    """Return the weights in a `.keras` file, or raise `UserError` if they can't be converted.

    The config of a subclassed model does not describe its layers. They are assumed to have the
    default activations of Keras.
    """
    with weights_lib.parsing(".keras file of Keras 3"):
        with zipfile.ZipFile(file) as archive:
            limit = _MAX_RATIO * file.seek(0, io.SEEK_END) + _SMALL
            config = json.loads(_unpack(archive, "config.json", _CONFIG_LIMIT))
            weights = io.BytesIO(_unpack(archive, "model.weights.h5", limit))
        if config["class_name"] in ("Sequential", "Functional"):
            _check_layers(config["config"]["layers"], config["class_name"] == "Functional")
    return read_weights(weights)


def _unpack(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Return the content of a file in an archive, or raise `UserError` if it is far too large."""
    member = archive.getinfo(name)
    # The other methods unpack without a limit.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"its {name} is compressed in a way that Keras does not use")
    if member.file_size > limit:  # No more than this is unpacked.
        raise UserError(f"its {name} has {member.file_size:,} bytes, which is too large")
    return archive.read(member)


def read_weights(file: BinaryIO) -> Weights:
    """Return the weights in a `.weights.h5` file, or raise `UserError` as `read_archive` does."""
    h5py = weights_lib.require("h5py")
    groups: dict[str, list[np.ndarray]] = {}
    left = file.seek(0, io.SEEK_END)  # Bytes that arrays may have.

    def visit(path: str, item: Any) -> None:
        """Add a variable to those of its layer or cell; skip those of the optimizer."""
        nonlocal left
        parent, _, number = path.rpartition("/vars/")
        if not parent or not number.isdigit() or path.startswith("optimizer"):
            return
        if not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
            raise UserError(f"{path} is not an array, or is stored in another file")
        left -= item.nbytes
        if left < 0:
            raise UserError(f"the {item.nbytes:,} bytes of {path} are not in the file")
        if item.chunks:  # Only chunks can be compressed.
            raise UserError(f"{path} is stored in chunks, which Keras does not write")
        if item.dtype.kind == "f":
            groups.setdefault(parent, []).append(np.asarray(item, np.float32))
        elif "seed_generator" not in parent:  # Dropout stores its random state.
            raise UserError(f"{parent} contains {item.dtype}, not floating-point numbers")

    with weights_lib.parsing(".weights.h5 file of Keras 3"), h5py.File(file, "r") as content:
        if "layer_names" in content.attrs or "model_weights" in content:
            raise UserError("it is from Keras 2: save it there with model.save('model.keras')")
        content.visititems(visit)
    layers = {}
    for path in [path for path in groups if path.endswith("/cell")]:
        if "forward_layer" in path or "backward_layer" in path:
            raise UserError(f"{path}: a bidirectional layer can't predict the next token")
        layers[path] = _make_layer(groups.pop(path), path)
    return weights_lib.build_weights(layers, groups, transposed=False)


def write_archive(weights: Weights) -> bytes:
    """Return a `.keras` file with a Sequential model, for `keras.models.load_model`."""

    def describe(kind: str, module: str = "keras.layers", **config: object) -> dict[str, object]:
        return {"module": module, "class_name": kind, "config": config, "registered_name": None}

    vocabulary, features = weights.embedding.shape
    layers = [
        describe("InputLayer", batch_shape=[None, None], dtype="int32", name="ids"),
        describe("Embedding", input_dim=vocabulary, output_dim=features, name="embedding"),
        *(
            describe(_CLASSES[weights.cell], units=size, return_sequences=True, name=name)
            for name, size in zip(_name_layers(weights), weights.hidden_sizes, strict=True)
        ),
        describe("Dense", units=vocabulary, name="dense"),
    ]
    config = describe("Sequential", "keras", name="lstm_jax", layers=layers)
    config["build_config"] = {"input_shape": [None, None]}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
        file.writestr("config.json", json.dumps(config))
        file.writestr("model.weights.h5", write_weights(weights))
    return archive.getvalue()


def write_weights(weights: Weights) -> bytes:
    """Return a `.weights.h5` file, for `load_weights` of a Sequential or functional model."""
    h5py = weights_lib.require("h5py")
    variables = {"embedding": [weights.embedding], "dense": [weights.kernel, weights.bias]}
    for name, layer in zip(_name_layers(weights), weights.layers, strict=True):
        arrays = [layer["input_kernel"], layer["recurrent_kernel"], layer["bias"]]
        if weights.cell == "gru":
            arrays[2] = weights_lib.split_biases(layer)
            arrays = [weights_lib.reorder_gates(array, _GRU) for array in arrays]
        variables[f"{name}/cell"] = arrays
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for path, arrays in variables.items():
            for number, array in enumerate(arrays):
                file.create_dataset(f"layers/{path}/vars/{number}", data=array)
    return content.getvalue()


def _name_layers(weights: Weights) -> list[str]:
    """Return the names that Keras gives the layers in its files."""
    name = {"rnn": "simple_rnn"}.get(weights.cell, weights.cell)
    return [f"{name}_{i}" if i else name for i in range(len(weights.layers))]


def _check_layers(layers: list[dict[str, Any]], functional: bool) -> None:
    """Raise `UserError` for the first layer of a config that can't be converted."""
    classes, before = [], None
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        name = config["name"]
        if functional and before is not None:
            nodes = json.dumps(layer["inbound_nodes"])
            if re.findall(r'"keras_history": \["([^"]*)", 0, (\d+)', nodes) != [(before, "0")]:
                raise UserError(f"the layer {name!r} has inputs other than the layer before it")
        before = name
        if kind == "TimeDistributed":
            kind, config = config["layer"]["class_name"], config["layer"]["config"]
        if kind in _IGNORED:
            continue
        if kind not in _SUPPORTED:
            raise UserError(f"the layer {name!r} can't be converted: it is a {kind}")
        for field, allowed in _SUPPORTED[kind].items():
            if config.get(field, allowed[0]) not in allowed:
                raise UserError(
                    f"the layer {name!r} has {field}={config[field]!r}: only "
                    f"{' or '.join(map(repr, allowed))} can be converted"
                )
        classes.append("RNN" if kind in _CLASSES.values() else kind)
    if not re.fullmatch("Embedding (RNN )+Dense( Activation| Softmax)?", " ".join(classes)):
        raise UserError(
            f"its layers are {', '.join(classes)}: they must be an Embedding, recurrent layers and "
            "a Dense"
        )


def _make_layer(arrays: list[np.ndarray], name: str) -> tuple[str, Layer]:
    """Return the cell of a layer, and its arrays in the gate order of `lstm_jax.cells`."""
    if len(arrays) not in (2, 3):
        raise UserError(f"{name} is not an LSTM, GRU or SimpleRNN")
    kernel, recurrent_kernel, *biases = arrays
    if biases and biases[0].ndim == 2:
        biases = list(biases[0])
    cell, layer = weights_lib.make_layer(name, kernel, recurrent_kernel, *biases)
    if cell == "gru":
        if len(biases) == 1:
            raise UserError(f"{name} has reset_after=False: the GRU here resets after the matmul")
        for key in ("input_kernel", "recurrent_kernel", "bias"):
            layer[key] = weights_lib.reorder_gates(layer[key], _GRU)
    return cell, layer
