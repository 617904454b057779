"""Decide what a run is trained with: its model, config and vocabulary, new or resumed."""

import dataclasses
import shlex
from pathlib import Path

import jax

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config
from lstm_jax.data.texts import Splits
from lstm_jax.errors import UserError, name_setting
from lstm_jax.regularization import drop_parameters
from lstm_jax.run import cell_file, workdir
from lstm_jax.vocabulary import Vocabulary

# The value before and the value now of each field that has changed, by dotted name.
Changes = dict[str, tuple[object, object]]
# Fields that a run and the one whose parameters it starts from must share.
_OF_MODEL = ("model.", "data.units", "data.document_separator")


def resolve_model(config: Config) -> Config:
    """Load the cell of a training config, and check the model; this initializes JAX.

    Return the config with the checksum of the cell's file.

    Raises:
      UserError: if the cell can't be loaded or breaks the protocol, or if `model.recurrence` can't
        run on this device, or a rate of `regularization` does not apply.
    """
    config = dataclasses.replace(config, model=cell_file.resolve_cell(config.model))
    try:
        stop_id = 0 if config.data.document_separator else None
        model = model_lib.make_model(config.model, 1, stop_id)
    except ValueError as error:
        raise UserError(f"config.model.recurrence: {error}") from None
    model_lib.check_model(model)
    key = jax.random.key(0)
    jax.eval_shape(
        lambda: drop_parameters(config.regularization, model_lib.init_params(model, key), key)
    )
    return config


def resolve_run(
    config: Config, directory: Path, splits: Splits
) -> tuple[Config, Vocabulary, Changes]:
    """Return config and vocabulary of a new run, or of the run in `directory` with its changes.

    `config` is complete, with the checksum of the text. Raise `UserError` if the run has another
    text, or another value of a field that can't change.
    """
    teachers = ",".join(map(_make_absolute, config.distill.teachers.split(",")))
    absolute = {"init_from": _make_absolute(config.init_from), "distill.teachers": teachers}
    config = config_lib.complete_config(config, absolute)
    if workdir.is_folder(directory):
        raise UserError(
            f"{directory} holds a model without its run: start a new run from the parameters, with "
            f"another working directory and {_start_from(directory)}"
        )
    if (directory / workdir.CONFIG).exists():
        before = workdir.load_config(directory)
        kept = {
            "init_from": config.init_from or before.init_from,
            "distill.teachers": config.distill.teachers or before.distill.teachers,
        }
        config = config_lib.complete_config(config, kept)
        changes = _find_changes(before, config, directory)
        return config, workdir.load_vocabulary(directory), changes
    for name in (workdir.CHECKPOINTS, workdir.METRICS):
        if (directory / name).exists():
            raise UserError(
                f"{directory} holds {name} but no {workdir.CONFIG}: restore that file, or start a "
                f"new run in another working directory"
            )
    train = splits.texts["train"]
    if not config.init_from:
        return config, train.make_vocabulary(config.data), {}
    source = workdir.find_model(config.init_from)
    _check_model(workdir.load_config(source), config, source)
    # No tokens of "bpe" are learned: those of the model can spell any word.
    new = train.make_vocabulary(dataclasses.replace(config.data, vocabulary_size=0))
    return config, extend_vocabulary(workdir.load_vocabulary(source), new), {}


def _make_absolute(model: str) -> str:
    """Return the absolute path of a model's directory; "" and the name of a packaged model stay."""
    is_path = model and not workdir.is_in_package(model)
    return str(workdir.expand_path(model).absolute()) if is_path else model


def extend_vocabulary(first: Vocabulary, second: Vocabulary) -> Vocabulary:
    """Return a vocabulary of the tokens of `first` with their ids, and then new ones of `second`.

    For kind "bpe", only a new stop token is added.

    Raise `UserError` if the kind of tokens or the stop token differs.
    """
    if first.kind != second.kind:
        raise UserError(
            f"the initial model was trained on {first.kind}: set data.units={first.kind}, or "
            "start from another model"
        )
    if first.stop not in ("", second.stop):
        raise UserError(
            f"documents of the initial model end with {first.stop!r}, and those of this text with "
            f"{second.stop!r}: set the same data.document_separator and convert the line breaks of "
            "the text, or start from another model"
        )
    added = [second.stop] if first.kind == "bpe" else second.tokens
    new = (token for token in added if token not in first)
    return Vocabulary([*first.tokens, *new], first.kind, second.stop)


def _find_changes(before: Config, config: Config, directory: Path) -> Changes:
    """Return the changed fields of a run that resumes; raise `UserError` if one can't change."""
    old = dict(config_lib.flatten(before))
    changes = {f: (old[f], value) for f, value in config_lib.flatten(config) if value != old[f]}
    if _have_same_cell(before, config):
        changes.pop("model.cell", None)  # The file may move.
        if "model.cell_sha256" in changes:
            raise UserError(
                f"{config.model.cell} has changed since the run in {directory} began: restore it, "
                f"or start a new run from the parameters, with another working directory and "
                f"{_start_from(directory)}"
            )
    fixed = {f: values for f, values in changes.items() if f not in config_lib.CHANGEABLE}
    is_other_text = fixed.pop("data.sha256", None)
    if fixed:
        listed = "; ".join(f"{f} was {was!r} and is {now!r}" for f, (was, now) in fixed.items())
        raise UserError(
            f"{directory} holds a run with another config ({listed}): resume with that config, or "
            f"use another working directory"
        )
    if is_other_text:
        text = before.data.path or f"the dataset {before.data.dataset}"
        raise UserError(
            f"{directory} holds a run that was trained on another text, or on other splits of it "
            f"({text}): restore that text, or use another working directory"
        )
    return changes


def _start_from(directory: Path) -> str:
    """Return the setting that starts a run from these parameters, as a message names it."""
    return f"--init_from {shlex.quote(str(directory))}"


def _check_model(before: Config, config: Config, directory: Path) -> None:
    """Raise `UserError` if a run can't start from the model of `before`, in `directory`."""
    new = dict(config_lib.flatten(config))
    # The parameters replace the initial ones, and the checksum of a cell follows from the cell.
    ignored = {"model.cell_sha256", *config_lib.CHANGEABLE}
    if _have_same_cell(before, config):
        ignored.add("model.cell")
    if not before.data.document_separator:  # The vocabulary gets the stop token.
        ignored.add("data.document_separator")
    wanted = {
        field: value
        for field, value in config_lib.flatten(before)
        if field.startswith(_OF_MODEL) and not field.startswith("model.initial_")
        if field not in ignored and value != new[field]
    }
    if not wanted:
        return
    if wanted.pop("model.options", None):
        options = before.model.options
        wanted |= {f"model.options.{name}": value for name, value in options.items()}
    set_all = " ".join(name_setting(*item) for item in wanted.items())
    remedy = f"add {set_all}" if wanted else "leave out config.model.options"
    raise UserError(f"the model in {directory} has other settings: {remedy}")


def _have_same_cell(before: Config, config: Config) -> bool:
    """Return whether both have a cell of a file, with the same name, though files may differ."""
    same_name = cell_file.get_class_name(before.model) == cell_file.get_class_name(config.model)
    return bool(config.model.cell_sha256) and same_name
