"""Convert a file of PyTorch's weights to the folder of a model, and back; make such a folder."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import torch_weights
from lstm_jax.data import files, texts
from lstm_jax.errors import UserError, make_command, make_visible, name_failure, print_line
from lstm_jax.run import messages, model_file, workdir
from lstm_jax.run.library import load
from lstm_jax.vocabulary import SEPARATORS, Vocabulary

MODULES = ("embedding", "lstm", "linear")
_CARD = """---
library_name: lstm-jax
pipeline_tag: text-generation
---

# {name}

A language model of lstm-jax, with its parameters at step {step} in {dtype}.

    python -m lstm_jax.sample --workdir {name} --prompt "A"
"""


def import_weights(
    source: Path, directory: Path, vocabulary_file: str | None, modules: Sequence[str] = MODULES
) -> None:
    """Make the folder of a model from a file of weights, or raise `UserError`.

    The tokens are those of `vocabulary_file`, a vocabulary.json. `modules` are the names of the
    Embedding, the LSTM or GRU, and the Linear.
    """
    example = '{"kind": "characters", "stop": "", "units": ["a", "b"]}'
    if not vocabulary_file:
        raise UserError(
            f"{source} does not contain its vocabulary: give --vocabulary FILE, with the tokens by "
            f"id, such as {example}"
        )
    config, directory = config_lib.default(), workdir.expand_path(directory).absolute()
    content = texts.read_argument(vocabulary_file, "--vocabulary", "characters").read()
    try:
        fields = json.loads(content)
        # A slice, which an object has not: its keys would be read as tokens.
        tokens, kind, stop = fields["units"][:], fields["kind"], fields["stop"]
        separators = {texts.find_stop_text(s, [stop]): s for s in SEPARATORS}
        config.data.units, config.data.document_separator = kind, separators[stop]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(
            f"{vocabulary_file} (--vocabulary) is not a vocabulary.json, such as {example}"
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
    print_line(f"Wrote the model of {source} to {directory}")
    print_line(f"Generate text: {make_command('sample', '--workdir', str(directory))}")


def export_weights(directory: Path, target: Path) -> None:
    """Write the best checkpoint of a working directory to a file of weights, or raise `UserError`.

    The vocabulary is written beside it, to a file with .vocabulary.json added to the name.
    """
    beside = target.with_name(target.name + ".vocabulary.json")
    for path in (target, beside):
        if path.exists():
            raise UserError(f"{path} exists: remove it, or use another --to")
    config = workdir.load_config(workdir.find_model(directory))
    try:
        torch_weights.check_model(config.model)
    except UserError as error:
        raise UserError(f"{directory} can't be converted: {error}") from None
    trained = load(directory)
    content = torch_weights.to_bytes(torch_weights.from_model(trained.model, trained.params))
    with name_failure(f"can't write {target}"):
        files.write_file(beside, json.dumps(trained.vocabulary.to_fields(), indent=0).encode())
        files.write_file(target, content)
    print_line(
        f"Wrote the model of {directory}, step {trained.step}, to {target}, tokens to {beside}"
    )


def export_folder(directory: Path, target: Path, dtype: str) -> None:
    """Write the best checkpoint of a working directory as a folder, or raise `UserError`.

    The folder is read like the working directory. Its parameters are rounded to `dtype`.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it, or use another --to")
    source = workdir.find_model(directory)
    config = workdir.load_config(source)
    if config.model.cell_sha256:
        raise UserError(
            f"{directory} can't be a folder: its cell, {config.model.cell}, is in a file of yours"
        )
    trained = load(source)
    name = make_visible(target.resolve().name)
    make_folder(
        target.absolute(),
        config,
        trained.vocabulary,
        trained.params,
        trained.step,
        dtype,
        _CARD.format(name=name, step=trained.step, dtype=dtype),
    )
    print_line(f"Wrote the model of {directory}, step {trained.step}, to {target}, in {dtype}")


def make_folder(
    directory: Path,
    config: config_lib.Config,
    vocabulary: Vocabulary,
    params: model_lib.Params,
    step: int = 0,
    dtype: str = "float32",
    card_text: str = "",
) -> None:
    """Make the folder of a model, complete or not at all; raise `UserError` if that fails.

    It has a card if there is a text for it.
    """
    with name_failure(f"can't write to {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unfinished-") as unfinished:
            made = Path(unfinished, directory.name)
            made.mkdir()
            workdir.save_fields(made, config, vocabulary)
            model_file.write_params(made / workdir.MODEL, params, step, dtype)
            if card_text:
                files.write_file(made / "README.md", card_text.encode())
            made.rename(directory)
