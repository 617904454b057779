"""Convert a file of PyTorch's weights to the folder of a model, and back; make such a folder."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lstm_jax import cells
from lstm_jax import config as config_lib
from lstm_jax.config import Config
from lstm_jax.convert import torch_weights
from lstm_jax.data import files, texts
from lstm_jax.errors import UserError, make_command, name_failure, note
from lstm_jax.model import Params
from lstm_jax.run import messages, workdir
from lstm_jax.run.run import Run, load
from lstm_jax.vocabulary import SEPARATORS, Vocabulary


def import_weights(
    source: Path,
    directory: Path,
    vocabulary_file: str,
    modules: Sequence[str] = ("embedding", "lstm", "linear"),
) -> None:
    """Make the folder of a model from a file of weights, or raise `UserError`.

    The tokens are those of `vocabulary_file`, a vocabulary.json. `modules` are the names of the
    Embedding, the LSTM or GRU, and the Linear.
    """
    config, directory = config_lib.default(), workdir.expand_path(directory).absolute()
    content = texts.read_argument(vocabulary_file, "--vocabulary", "characters").read()
    try:
        fields = json.loads(content)
        # A slice, which an object has not: its keys would be read as tokens.
        tokens, kind, stop = fields["units"][:], fields["kind"], fields["stop"]
        separators = {text: name for name, text in SEPARATORS.items()}
        config.data.units, config.data.document_separator = kind, separators[stop]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(
            f"{vocabulary_file} (--vocabulary) is not a vocabulary.json, such as "
            '{"kind": "characters", "stop": "", "units": ["a", "b"]}'
        ) from None
    try:
        arrays = torch_weights.read_file(source)
        fields, params = torch_weights.to_model(arrays, modules)
        params, vocabulary = torch_weights.add_special_rows(params, tokens, kind, stop)
    except UserError as error:
        raise UserError(f"{source} can't be converted: {error}") from None
    config.model.update(fields)
    make_folder(directory, config_lib.complete_config(config), vocabulary, params)
    print(f"{messages.format_parameters(params)}\n")
    note(f"Wrote the model of {source} to {directory}")
    note(f"Generate text: {make_command('sample', '--workdir', str(directory))}")


def export_weights(directory: Path, target: Path) -> None:
    """Write the best checkpoint of a working directory to a file of weights, or raise `UserError`.

    The vocabulary is written beside it, to a file with .vocabulary.json added to the name.
    """
    beside = target.with_name(target.name + ".vocabulary.json")
    run = _load(directory, target, beside)
    content = torch_weights.to_bytes(torch_weights.from_model(run.model, run.params))
    with name_failure(f"can't write {target}"):
        files.write_file(beside, json.dumps(run.vocabulary.to_fields(), indent=0).encode())
        files.write_file(target, content)
    note(f"Wrote the model of {directory}, step {run.step}, to {target}, tokens to {beside}")


def export_folder(directory: Path, target: Path, dtype: str) -> None:
    """Write the best checkpoint of a working directory as a folder, or raise `UserError`.

    The folder is read like the working directory. Its parameters are rounded to `dtype`.
    """
    run = _load(directory, target)
    make_folder(target.absolute(), run.config, run.vocabulary, run.params, run.step, dtype)
    note(f"Wrote the model of {directory}, step {run.step}, to {target}, in {dtype}")


def _load(directory: Path, *targets: Path) -> Run:
    """Return the model of a working directory, if no target exists, and no file has its cell."""
    for path in targets:
        if path.exists():
            raise UserError(f"{path} exists: remove it, or use another --to")
    model = workdir.load_config(workdir.find_model(directory)).model
    if cells.names_file(model.cell):
        raise UserError(f"{directory} can't be converted: its cell is in a file, {model.cell}")
    return load(directory)


def make_folder(
    directory: Path,
    config: Config,
    vocabulary: Vocabulary,
    params: Params,
    step: int = 0,
    dtype: str = "float32",
) -> None:
    """Make the folder of a model, complete or not at all; raise `UserError` if that fails."""
    with name_failure(f"can't write to {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unfinished-") as unfinished:
            folder = Path(unfinished, directory.name)
            folder.mkdir()
            workdir.save_fields(folder, config, vocabulary)
            workdir.write_params(folder / workdir.MODEL, params, step, dtype)
            folder.rename(directory)
