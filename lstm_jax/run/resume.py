"""Start or resume a run: its config and vocabulary, and its model, state and batches."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np

from lstm_jax import batches
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.cells.making import trace_cell
from lstm_jax.config import Config
from lstm_jax.devices import hosts
from lstm_jax.errors import UserError, another_directory, for_caller, set_field
from lstm_jax.regularization import drop_parameters
from lstm_jax.run import cell_file, checkpoints, files, workdir
from lstm_jax.run.plan import Plan
from lstm_jax.train_step import TrainState, init_state
from lstm_jax.vocabulary import Ids, Vocabulary

# The value before and the value now of each field that has changed, by dotted name.
Changes = dict[str, tuple[object, object]]
# Fields that a run and the one whose parameters it starts from must share.
_OF_MODEL = ("model.", "data.units", "data.document_separator")


class Resolved(NamedTuple):
    """The config and vocabulary of a run, and changes of the config since it was last trained."""

    config: Config
    vocabulary: Vocabulary
    changes: Changes


def resolve_model(config: Config) -> Config:
    """Load the cell of a training config, and check the model; this initializes JAX.

    Return the config with the checksum of the cell's file.

    Raises:
      UserError: if the cell can't be loaded or breaks the protocol, or if `model.recurrence` can't
        run on this device, or a rate of `regularization` does not apply.
    """
    config = dataclasses.replace(config, model=cell_file.resolve_cell(config.model))
    try:
        model = model_lib.make_model(config.model, 1)
        model.implementation()
    except ValueError as error:
        raise UserError(f"config.model.recurrence: {error}") from None
    for cell in set(model.clone(block="none").make_cells()):
        trace_cell(cell)
    model_lib.check_operations(model)
    key = jax.random.key(0)
    jax.eval_shape(
        lambda: drop_parameters(config.regularization, model_lib.init_params(model, key), key)
    )
    return config


def resolve_run(
    config: Config, directory: Path, make_vocabulary: Callable[[], Vocabulary]
) -> Resolved:
    """Return config and vocabulary of a new run, or of the run in `directory` with its changes.

    Args:
      config: a complete config, with the checksum of the text.
      directory: the working directory.
      make_vocabulary: returns the vocabulary of the training text, for a new run.

    Raises:
      UserError: if the run has another text, or another value of a field that can't change.
    """
    if config.init_from:
        config = dataclasses.replace(config, init_from=str(Path(config.init_from).absolute()))
    workdir.check_regular_files(directory)
    if (directory / workdir.CONFIG).exists():
        before = workdir.load_config(directory)
        config = dataclasses.replace(config, init_from=config.init_from or before.init_from)
        changes = _compare(before, config, directory)
        return Resolved(config, workdir.load_vocabulary(directory), changes)
    for name in (workdir.CHECKPOINTS, workdir.METRICS):
        if (directory / name).exists():
            raise UserError(
                f"{directory} holds {name} but no {workdir.CONFIG}: restore that file, or start a "
                f"new run in {another_directory()}"
            )
    vocabulary = make_vocabulary()
    if config.init_from:
        source = Path(config.init_from)
        _compare(workdir.load_config(source), config, source, of_model=True)
        vocabulary = extend_vocabulary(workdir.load_vocabulary(source), vocabulary)
    return Resolved(config, vocabulary, {})


def extend_vocabulary(first: Vocabulary, second: Vocabulary) -> Vocabulary:
    """Return a vocabulary of the tokens of `first` with their ids, and then new ones of `second`.

    For kind "bpe", only a new stop token is added, since the tokens of `first` can spell any word.

    Raise `UserError` if the kind of tokens or the stop token differs.
    """
    if first.kind != second.kind:
        raise UserError(
            f"the initial model was trained on {first.kind}: set data.units={first.kind}, or "
            "start from another model"
        )
    if first.stop not in ("", second.stop):
        raise UserError(
            f"documents of the initial model end with {first.stop!r}: set the same "
            "data.document_separator, or start from another model"
        )
    added = filter(None, [second.stop]) if first.kind == "bpe" else second.tokens
    new = (token for token in added if token not in first)
    return Vocabulary([*first.tokens, *new], first.kind, second.stop)


def _compare(before: Config, config: Config, directory: Path, of_model: bool = False) -> Changes:
    """Return the changed fields, or those `_OF_MODEL`; raise `UserError` if one can't change."""
    old = dict(config_lib.flatten(before))
    changes = {
        field: (old[field], value)
        for field, value in config_lib.flatten(config)
        if field.startswith(_OF_MODEL if of_model else "") and value != old[field]
    }
    same_class = cell_file.get_class_name(before.model) == cell_file.get_class_name(config.model)
    if config.model.cell_sha256 and same_class:
        changes.pop("model.cell", None)  # The file may move.
        if changes.pop("model.cell_sha256", None) and not of_model:
            initial = for_caller(
                f"--init_from {shlex.quote(str(directory))}",
                f"config.init_from = {str(directory)!r}",
            )
            raise UserError(
                f"{config.model.cell} has changed since the run in {directory} began: restore it, "
                f"or start a new run from the parameters, with {another_directory()} and {initial}"
            )
    fixed = {f: values for f, values in changes.items() if f not in config_lib.CHANGEABLE}
    if "data.sha256" in fixed:
        text = before.data.path or f"the dataset {before.data.dataset}"
        raise UserError(
            f"{directory} holds a run that was trained on another text ({text}): restore "
            f"that text, or use {another_directory()}"
        )
    if of_model:  # The given parameters replace the initial ones.
        fixed = {f: values for f, values in fixed.items() if not f.startswith("model.initial_")}
        if not before.data.document_separator:  # The vocabulary gets the stop token.
            fixed.pop("data.document_separator", None)
    if fixed and of_model:
        fixed.pop("model.cell_sha256", None)  # It follows from the cell.
        wanted = {field: was for field, (was, _) in fixed.items()}
        if "model.options" in wanted:
            del wanted["model.options"]
            options = before.model.options
            wanted |= {f"model.options.{name}": value for name, value in options.items()}
        set_all = for_caller(" ", "; ").join(set_field(*item) for item in wanted.items())
        remedy = f"add {set_all}" if wanted else "leave out config.model.options"
        raise UserError(f"the model in {directory} has other settings: {remedy}")
    if fixed:
        listed = "; ".join(f"{f} was {was!r} and is {now!r}" for f, (was, now) in fixed.items())
        raise UserError(
            f"{directory} holds a run with another config ({listed}): resume with that config, or "
            f"use {another_directory()}"
        )
    return changes


class Start(NamedTuple):
    """The state that training starts from, new or restored."""

    model: model_lib.LanguageModel
    state: TrainState
    iterator: grain.DatasetIterator  # Over training batches, or over their offsets.
    step: int  # Training steps done.
    plan: Plan
    history: dict[str, int] | None  # `workdir.history_sizes` when it was saved; None if it is new.
    # The step of the model whose parameters a new run starts from, and its number of tokens.
    source: tuple[int, int] | None


def restore_run(
    resolved: Resolved,
    directory: Path,
    ids: Ids,
    count_tokens: Callable[[Vocabulary], np.ndarray],
    mesh: jax.sharding.Mesh | None = None,
    only_offsets: bool = False,
) -> Start:
    """Make model, state and batches, or restore them from a checkpoint; save `resolved`.

    Args:
      resolved: from `resolve_run`.
      directory: the working directory.
      ids: those of the training text.
      count_tokens: returns the number of occurrences of each token there, for a new run.
      mesh: the devices; None for the default device.
      only_offsets: see `batches.make_batches`.

    Raises:
      UserError: if the text is too short, or the run is damaged or was trained for more epochs.
    """
    config, vocabulary, changes = resolved
    part = (jax.process_index(), jax.process_count())
    iterator, steps_per_epoch = batches.make_batches(
        ids, config.batches, config.seed, only_offsets, part
    )
    plan = Plan(config, steps_per_epoch)
    model = model_lib.make_model(config.model, len(vocabulary))
    saved_in = directory / workdir.CHECKPOINTS
    is_new = not checkpoints.list_steps(saved_in)
    trained = workdir.load_trained(config.init_from) if config.init_from and is_new else None
    state = init_state(
        model,
        optimizer_lib.make_optimizer(config.optimizer, plan.total_steps),
        jax.random.key(config.seed),
        config.batches.batch_size,
        averaged=optimizer_lib.has_average(config.optimizer),
        trained=trained.params if trained else None,
        mesh=mesh,
        counts=count_tokens(vocabulary) if is_new else None,
    )
    restored = checkpoints.restore_latest(saved_in, state.evaluated, state.rest, iterator)
    step, history = 0, None
    if restored:
        step, history = restored.step, restored.history
        state = TrainState.join(restored.params, restored.state)
    elif (directory / workdir.METRICS).exists():
        raise UserError(
            f"{directory} holds {workdir.METRICS} but no checkpoint: restore "
            f"{workdir.CHECKPOINTS}/, or start a new run in {another_directory()}"
        )
    if step > plan.total_steps:
        limit = f"{plan.limit}={getattr(config, plan.limit)}"
        raise UserError(
            f"the run in {directory} has trained {plan.describe_length(step)} already, and "
            f"{limit} is fewer: set more, or use {another_directory()}"
        )
    with hosts.main_process_first("config"):
        if hosts.is_first():
            files.remove_partial(directory)
            if changes:
                workdir.append_changes(directory, step, changes)
            workdir.save_vocabulary(directory, vocabulary)
            workdir.save_config(directory, config)
    source = (trained.step, len(trained.vocabulary)) if trained else None
    return Start(model, state, iterator, step, plan, history, source)
