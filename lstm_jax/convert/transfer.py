"""Weights in and out, from and to Keras and PyTorch.

    python -m lstm_jax.convert --from model.keras --vocabulary vocabulary.json --workdir runs/new
    python -m lstm_jax.convert --workdir runs/quick --to model.safetensors

What a file holds, its name says: .keras, .weights.h5 (both Keras 3) or .safetensors (PyTorch).
"""

import contextlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import keras_weights, torch_weights, weights
from lstm_jax.data import sources, texts
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, files, workdir
from lstm_jax.vocabulary import PADDING, SEPARATORS, UNKNOWN, Vocabulary, find_stop_text

# How the content of a file is read and written, by the end of its name.
_FORMATS = {
    ".keras": (keras_weights.read_archive, keras_weights.write_archive),
    ".weights.h5": (keras_weights.read_weights, keras_weights.write_weights),
    ".safetensors": (torch_weights.read_state_dict, torch_weights.write_state_dict),
}
# What to do about a file with another name that is to be read, and one that is to be written.
_KERAS = (
    "save it in Keras 3 with model.save('model.keras')",
    "name a file that ends in .keras or .weights.h5",
)
_TORCH = (
    "save it with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
    "name a file that ends in .safetensors",
)
_REMEDIES = {".h5": _KERAS, ".hdf5": _KERAS, ".pt": _TORCH, ".pth": _TORCH}
# Bytes of a vocabulary, at the most.
_LARGEST_VOCABULARY = 2**25
# In a vocabulary that is a text file with a unit a line.
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def import_weights(
    source: Path, directory: Path, vocabulary_file: str | None, text_file: str | None
) -> None:
    """Makes a working directory of a file of weights.

    Args:
      source: the file.
      directory: the working directory, made whole or not at all.
      vocabulary_file: the units: see `read_vocabulary`.
      text_file: the text that the model was trained on. `evaluate` will read it; without a
        vocabulary, that is its characters.

    Raises:
      UserError: if a file can't be read or converted, or the directory holds something.
    """
    read, _ = _format(source, "--from")
    if vocabulary_file is None and text_file is None:
        raise UserError(
            f"{source} does not say what its ids stand for: give --vocabulary FILE, or --text FILE "
            "with the text whose characters they are"
        )
    directory = directory.absolute()
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} holds something already: name another --workdir")
    config = config_lib.default()
    if text_file is not None:
        config.data.path = sources.make_absolute(text_file)
    if vocabulary_file is not None:
        units, kind, stop = read_vocabulary(Path(vocabulary_file))
    else:
        text = sources.read_files(sources.find_files(config.data.path)[0])
        units, kind, stop = [PADDING, UNKNOWN, *sorted(set(text))], "characters", ""
    try:
        with _open(source) as file:
            loaded = read(file)
        own, vocabulary, added = weights.with_vocabulary(loaded, units, kind, stop)
        fields, params = weights.to_model(own)
    except UserError as error:
        raise UserError(f"{source} can't be converted: {error}") from None
    config.model.update(fields)
    config.data.units = vocabulary.kind
    config.data.document_separator = _separator(vocabulary)
    if text_file is not None:
        config.data.sha256 = texts.compute_checksum(texts.read_splits(config.data))
    _make(directory, config_lib.complete_config(config), vocabulary, params)
    print(f"{model_lib.format_parameters(params)}\n")
    if added:
        print(f"It had no {' and '.join(map(repr, added))}: added, and next to never predicted")
    print(
        f"The model of {source} is in {directory}\n"
        f"Let it write: python -m lstm_jax.sample --workdir {directory}"
    )


def export_weights(directory: Path, target: Path, drop_special: bool = False) -> None:
    """Writes the best checkpoint of a working directory as a file of weights.

    Beside it, its name with .vocabulary.json added, is what its ids stand for.

    Args:
      directory: the working directory.
      target: the file.
      drop_special: whether to leave out the rows of "" and "[UNK]".

    Raises:
      UserError: if the model can't be converted, or a file is there already or can't be written.
    """
    _, write = _format(target, "--to")
    beside = target.with_name(target.name + ".vocabulary.json")
    for path in (target, beside):
        if path.exists():
            raise UserError(f"{path} is there already: remove it, or name another --to")
    trained = workdir.load_trained(directory)
    try:
        own = weights.from_model(trained.model, trained.params)
    except UserError as error:
        raise UserError(f"{directory} can't be converted: {error}") from None
    units = list(trained.vocabulary.tokens)
    if drop_special:
        own, units = weights.without_special(own), units[2:]
    content = write(own)
    vocabulary = {"kind": trained.vocabulary.kind, "stop": trained.vocabulary.stop, "units": units}
    try:
        files.write_file(beside, (json.dumps(vocabulary, indent=0) + "\n").encode())
        files.write_file(target, content)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"can't write {target}: {error.strerror}") from None
    print(f"The model of {directory}, step {trained.step}, is in {target}; its units, in {beside}")
    if trained.model.dtype != "float32":
        print(
            f"Here it multiplies in {trained.model.dtype}, and what reads the file, in float32: "
            "logits differ by the rounding"
        )


def read_vocabulary(path: Path) -> tuple[list[str], str, str]:
    r"""The units of a vocabulary by id, of what kind they are, and the stop token.

    A file is the vocabulary.json of a working directory, or what `export_weights` wrote; a JSON list of
    characters, or object of characters and their ids; or a text with a character a line, where \n,
    \r, \t and \\ stand for what they mean.

    Raises:
      UserError: if it is none of these.
    """
    with _open(path) as file:
        content = file.read(_LARGEST_VOCABULARY + 1)
    if len(content) > _LARGEST_VOCABULARY:
        raise UserError(f"{path} (--vocabulary) is larger than a vocabulary can be")
    text = sources.decode_text(content, str(path), any_bytes=False)
    try:
        units: Any = json.loads(text)
    except (ValueError, RecursionError):
        if path.suffix == ".json":
            raise UserError(f"{path} (--vocabulary) is no JSON") from None
        lines = text.removesuffix("\n").split("\n")
        return [_ESCAPES.get(line, line) for line in lines], "characters", ""
    kind, stop = "characters", ""
    if isinstance(units, dict) and {"kind", "stop", "units"} <= set(units):
        kind, stop, units = units["kind"], units["stop"], units["units"]
    elif isinstance(units, dict):
        if sorted(units.values(), key=repr) != sorted(range(len(units)), key=repr):
            raise UserError(f"{path} (--vocabulary): its ids are not 0 to {len(units) - 1}")
        units = sorted(units, key=units.__getitem__)
    if not isinstance(units, list) or not all(isinstance(x, str) for x in [kind, stop, *units]):
        raise UserError(f"{path} (--vocabulary) is no list of units, nor a vocabulary.json")
    return units, kind, stop


def _format(path: Path, flag: str) -> tuple[Any, Any]:
    for suffix, functions in _FORMATS.items():
        if path.name.endswith(suffix):
            return functions
    any_other = ("its name must end with one of these",) * 2
    remedy = _REMEDIES.get(path.suffix, any_other)[flag == "--to"]
    raise UserError(f"{path} ({flag}) is none of {', '.join(_FORMATS)}: {remedy}")


def _open(path: Path) -> BinaryIO:
    try:
        return files.open_regular(path, follow=True)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None


def _separator(vocabulary: Vocabulary) -> str:
    """What `data.document_separator` was for a vocabulary with this stop token."""
    if not vocabulary.stop:
        return ""
    for name in SEPARATORS:
        if name and find_stop_text(name, vocabulary.stop) == vocabulary.stop:
            return name
    raise UserError(f"documents here don't end with {vocabulary.stop!r}")


def _make(
    directory: Path, config: ConfigDict, vocabulary: Vocabulary, params: model_lib.Params
) -> None:
    """Makes a working directory, under another name until all of it is there."""
    try:
        with files.unfinished_directory(directory) as partial:
            workdir.save_config(partial, config)
            workdir.save_vocabulary(partial, vocabulary)
            checkpoints.save_params(partial / workdir.CHECKPOINTS, 0, params)
            partial.rename(directory)
    except OSError as error:
        raise UserError(f"can't write to {directory}: {error.strerror}") from None
