"""Convert a file of PyTorch's weights to the folder of a model, and back; make such a folder."""

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import card, torch_weights
from lstm_jax.data import files, texts
from lstm_jax.errors import UserError, name_failure, print_line
from lstm_jax.run import messages, metrics, model_file, workdir
from lstm_jax.vocabulary import SEPARATORS, Vocabulary

_CARD = "README.md"
MODULES = ("embedding", "lstm", "linear")


def import_weights(
    source: Path,
    directory: Path,
    vocabulary_file: str | None,
    text_file: str | None,
    modules: Sequence[str] = MODULES,
) -> None:
    """Make the folder of a model from a file of weights, or raise `UserError`.

    `text_file` is the text that the model was trained on, for `evaluate`. The tokens are those of
    the vocabulary.json `vocabulary_file`, or else the characters of this text. `modules` are the
    names of the Embedding, the LSTM or GRU, and the Linear.
    """
    if not vocabulary_file and not text_file:
        raise UserError(
            f"{source} does not contain its vocabulary: give --vocabulary FILE, or --text FILE "
            "with the text whose characters are the tokens"
        )
    directory = workdir.check_path(directory).absolute()
    config, tokens, stop = _describe_text(vocabulary_file, text_file)
    try:
        arrays = torch_weights.read_file(source)
        fields, params = torch_weights.to_model(arrays, modules)
        params, vocabulary = torch_weights.add_special_rows(params, tokens, config.data.units, stop)
    except UserError as error:
        raise UserError(f"{source} can't be converted: {error}") from None
    config.model.update(fields)
    make_folder(directory, config_lib.complete_config(config), vocabulary, params)
    print(f"{messages.format_parameters(params)}\n")
    print_line(f"Wrote the model of {source} to {directory}")
    print_line(f"Generate text: python -m lstm_jax.sample --workdir {shlex.quote(str(directory))}")


def _describe_text(
    vocabulary_file: str | None, text_file: str | None
) -> tuple[ConfigDict, Sequence[str], str]:
    """Return a config with the `data` fields of a model, its tokens by id, and the stop token."""
    config, tokens, stop = config_lib.default(), list[str](), ""
    if vocabulary_file:
        content = texts.read_argument(vocabulary_file, "--vocabulary", any_bytes=False)
        try:
            fields = json.loads(content)
            tokens, stop = list(fields["units"]), fields["stop"]
            names = {texts.find_stop_text(s, stop.__contains__): s for s in SEPARATORS}
            config.data.units, config.data.document_separator = fields["kind"], names[stop]
        except (ValueError, TypeError, LookupError, AttributeError):
            raise UserError(
                f"{vocabulary_file} (--vocabulary) is not a vocabulary.json, such as "
                '{"kind": "characters", "stop": "", "units": ["a", "b"]}'
            ) from None
    if text_file:
        config.data.path = texts.make_absolute(text_file)
        loaded = texts.load_texts(config_lib.complete_config(config).data)
        config.data.sha256 = loaded.sha256
        if not vocabulary_file:
            text = "".join(split.read() for split in loaded.texts.values())
            tokens = [*Vocabulary.from_text(text).tokens]
    return config, tokens, stop


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
    trained = workdir.load_trained(directory)
    content = torch_weights.to_bytes(torch_weights.from_model(trained.model, trained.params))
    with name_failure(f"can't write {target}"):
        files.write_file(beside, json.dumps(trained.vocabulary.to_fields(), indent=0).encode())
        files.write_file(target, content)
    print_line(
        f"Wrote the model of {directory}, step {trained.step}, to {target}, tokens to {beside}"
    )


def export_folder(directory: Path, target: Path, dtype: str) -> None:
    """Write the best checkpoint of a working directory as a folder, or raise `UserError`.

    The folder is read like the working directory. Its parameters are rounded to `dtype`, one of
    `model_file.DTYPES`.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it, or use another --to")
    source = workdir.find_model(directory)
    config = workdir.load_config(source)
    if config.model.cell_sha256:
        raise UserError(
            f"{directory} can't be a folder: its cell, {config.model.cell}, is in a file of yours"
        )
    trained = workdir.load_trained(source)
    rows = metrics.read_metrics(source / workdir.METRICS)
    content = card.make_card(target.resolve().name, trained, dtype, rows)
    make_folder(
        target.absolute(), config, trained.vocabulary, trained.params, trained.step, dtype, content
    )
    print_line(f"Wrote the model of {directory}, step {trained.step}, to {target}, in {dtype}")
    print_line(f"Its card, {target / _CARD}, names the text and the losses: complete it by hand")


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
            workdir.save_config(made, config)
            workdir.save_vocabulary(made, vocabulary)
            model_file.write_params(made / workdir.MODEL, params, step, dtype)
            if card_text:
                files.write_file(made / _CARD, card_text.encode())
            made.rename(directory)
