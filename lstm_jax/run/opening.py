"""Open a run, new or resumed: its text, model, latest checkpoint and files, ready for training."""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from lstm_jax import batches
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import CHANGEABLE, Config, flatten
from lstm_jax.data import texts
from lstm_jax.devices import parallel
from lstm_jax.errors import UnavailableError, UserError, warn
from lstm_jax.run import cell_file, metrics, workdir
from lstm_jax.run.checkpoints import (
    CheckpointWriter,
    list_steps,
    read_validation_loss,
    restore_latest,
)
from lstm_jax.run.library import load
from lstm_jax.train_step import TrainState, drop_parameters, init_state
from lstm_jax.vocabulary import Ids, TextSize, Vocabulary

_LOCK = ".lock"  # A file in the working directory.
# Files that a killed process can leave (`files.write_file`).
_PARTIAL = (".config.json.*.partial", ".vocabulary.json.*.partial", ".curves.png.*.partial")


class Plan(NamedTuple):
    """The steps of a run."""

    steps_per_epoch: int
    total_steps: int  # Until the end of the run, unless `patience` ends it earlier.
    validate_every_steps: int
    log_every_steps: int
    steps_per_call: int
    tokens_per_step: int
    schedule: optax.Schedule

    def count_epochs(self, step: int) -> float:
        """Return the number of passes over the training text after `step` steps."""
        return step / self.steps_per_epoch

    def validates_at(self, step: int) -> bool:
        """Return whether the run validates, and saves before that, after `step` steps, or 0."""
        every = self.validate_every_steps or self.steps_per_epoch
        return not step % every or not step % self.steps_per_epoch or step == self.total_steps

    def count_steps_of_call(self, step: int) -> int:
        """Return the number of steps of the next call, which must not cross a log or validation."""
        number = self.steps_per_call
        inside = range(step + 1, step + number)
        ends = any(not n % self.log_every_steps or self.validates_at(n) for n in inside)
        return 1 if ends else number

    def get_learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1, in the six digits of float32."""
        return float(f"{float(self.schedule(step - 1)):.6g}")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run, new or at its latest checkpoint, whose lock is held."""

    config: Config
    directory: Path
    vocabulary: Vocabulary
    ids: dict[str, Ids]  # Of each split.
    sizes: dict[str, TextSize]  # Of validation and test text, without the first token.
    mesh: Mesh
    model: model_lib.LanguageModel
    optimizer: optax.GradientTransformation
    plan: Plan
    first_state: TrainState  # Whose arrays the first step donates.
    first_step: int
    history: dict[str, int]  # The sizes, at this step, of the files that a run appends to.
    checkpoints: CheckpointWriter
    writer: metrics.MetricsWriter  # Used by process 0 only.
    notes: list[str]  # Lines about what it starts from.
    is_resumed: bool
    is_validated: bool  # Whether the latest checkpoint has been validated.
    prints: bool  # Whether this process prints: the first one, unless the run is quiet.

    def print(self, text: str) -> None:
        """Print to standard output, if this process prints."""
        # What reads the output, such as `tee`, may have ended with the same Ctrl-C: still save.
        with contextlib.suppress(BrokenPipeError):
            if self.prints:
                print(text, flush=True)

    def read_metrics(self) -> list[metrics.Row]:
        """Return the rows of metrics.jsonl."""
        return metrics.read_metrics(self.directory / workdir.METRICS)


@contextlib.contextmanager
def open_run(
    config: Config, directory: Path, watch: metrics.Watch = lambda row: None, quiet: bool = False
) -> Iterator[OpenRun]:
    """Open the run in `directory`, or a new one there, and close it at the end of the block.

    `config` is complete; for the other arguments and errors, see `training.train`.
    """
    config = dataclasses.replace(config, model=cell_file.resolve_cell(config.model))
    mesh = parallel.make_mesh(config)
    with contextlib.ExitStack() as stack:
        with parallel.main_process_first("text and lock"):
            splits = texts.load_texts(config.data)
            lock = stack.enter_context(_hold_lock(directory))
        config = dataclasses.replace(config, data=splits.resolve(config.data))
        start = _find_start(config, directory, splits.texts["train"])
        parallel.check_same(f"{lock} {start.is_resumed} {config.to_dict()}")
        with parallel.main_process_first("ids"):
            ids, sizes = splits.encode(start.vocabulary)
        run = _make_run(start, directory, ids, sizes, mesh, watch, quiet)
        stack.enter_context(run.checkpoints)
        stack.enter_context(run.writer)
        yield run


@contextlib.contextmanager
def _hold_lock(directory: Path) -> Iterator[str]:
    """Make `directory` and hold its lock, for all processes of a run; yield what is in its file.

    The operating system releases it with the process, however it ends. On a file system without
    locks, nothing is locked. Raise `UnavailableError` if a process of another run holds it, or the
    directory can't be written.
    """
    path = directory / _LOCK
    if not parallel.is_first():
        yield path.read_text() if path.exists() else ""
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UnavailableError(f"can't write to {directory}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(
                f"another process is training in {directory} ({path.read_text().strip()}): wait "
                "until it ends, stop it, or use another working directory"
            ) from None
        except OSError:
            pass  # The file system has no locks.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
        for partial in itertools.chain(*map(directory.glob, _PARTIAL)):
            partial.unlink()
        yield path.read_text()


class _Start(NamedTuple):
    """What a run is trained with, and starts from."""

    config: Config
    vocabulary: Vocabulary
    params: model_lib.Params | None  # Of another model.
    is_resumed: bool
    notes: list[str]


def _find_start(config: Config, directory: Path, text: texts.Text) -> _Start:
    """Return what a run starts from: nothing or another model, or its own files if it resumes.

    A run that resumes may have other values of the fields in `CHANGEABLE`.

    Raise `UserError` if files of the run are missing, a field can't change, or the model that it
    starts from has other sizes.
    """
    names = (workdir.CONFIG, *workdir.HISTORY, workdir.MODEL)
    has_config, *others = ((directory / name).exists() for name in names)
    is_resumed, notes = bool(list_steps(directory / workdir.CHECKPOINTS)), list[str]()
    if (is_resumed or any(others)) and not (is_resumed and has_config):
        missing = workdir.CHECKPOINTS if has_config else workdir.CONFIG
        raise UserError(
            f"{directory} holds no complete run: restore {missing}, or use another working "
            "directory"
        )
    if is_resumed:
        before = workdir.load_config(directory)
        config = dataclasses.replace(config, init_from=config.init_from or before.init_from)
        changes = _list_changes(before, config)
        if any(name not in CHANGEABLE for name, _, _ in changes):
            listed = "; ".join(
                f"{name} was {was!r} and is {now!r}"
                for name, was, now in changes
                if name not in CHANGEABLE or name == "data.path"  # Which names the other text.
            )
            raise UserError(
                f"{directory} holds a run with another config or text ({listed}): resume with "
                "its values, or begin anew: use another --workdir, or remove that directory"
            )
        cell_file.warn_if_changed(config.model, before.model, directory)
        notes = [f"{field} is now {now!r}; it was {was!r}" for field, was, now in changes]
        return _Start(config, workdir.load_vocabulary(directory), None, True, notes)
    if not config.init_from:
        return _Start(config, text.make_vocabulary(config.data), None, False, notes)
    source = load(config.init_from)
    for field, theirs, ours in _list_changes(source.config, config):
        is_initial = field.startswith("model.initial_") or field in CHANGEABLE
        if field == "data.units" or (field.startswith("model.") and not is_initial):
            raise UserError(
                f"--config.{field} is {ours!r}, but {theirs!r} in {config.init_from}, from which "
                "this run starts: set the same"
            )
    if config.distill.teachers:  # With other tokens, a model could not learn from them.
        own = workdir.load_vocabulary(workdir.find_model(config.distill.teachers.split(",")[0]))
    else:  # No tokens of "bpe" are learned: those of the model can spell any word.
        own = text.make_vocabulary(dataclasses.replace(config.data, vocabulary_size=0))
    vocabulary = source.vocabulary.extend(own)
    new = vocabulary.tokens[len(source.vocabulary) :]
    listed = f": {', '.join(map(repr, new[:10]))}" if new else ""
    notes.append(
        f"The initial weights are those of step {source.step} in {config.init_from}; "
        f"{len(new)} new tokens{listed}"
    )
    return _Start(config, vocabulary, source.params, False, notes)


def _list_changes(before: Config, config: Config) -> list[tuple[str, object, object]]:
    """Return name, value before and value now of each changed field; a cell's file may move."""
    old, new = (
        dict(flatten(one)) | {"model.cell": one.model.cell.rpartition(":")[2]}
        for one in (before, config)
    )
    return [
        (field, old[field], value)
        for field, value in new.items()
        if value != old[field] and field != "model.cell_sha256"
    ]


def _make_run(
    start: _Start,
    directory: Path,
    ids: dict[str, Ids],
    sizes: dict[str, TextSize],
    mesh: Mesh,
    watch: metrics.Watch,
    quiet: bool,
) -> OpenRun:
    """Make the model and the training state, which is that of the latest checkpoint if any."""
    config = start.config
    plan = _make_plan(config, len(ids["train"]))
    try:
        model = model_lib.make_model(config.model, len(start.vocabulary), start.vocabulary.stop_id)
    except ValueError as error:
        raise UserError(f"config.model.recurrence: {error}") from None
    model_lib.check_model(model)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, plan.total_steps)
    state = init_state(
        model,
        optimizer,
        jax.random.key(config.seed),
        config.batches.batch_size,
        trained=start.params,
        counts=None if start.is_resumed else texts.count_ids(ids["train"], len(start.vocabulary)),
    ).place(mesh)
    # A rate that does not apply to the parameters is an error.
    drop = functools.partial(drop_parameters, config.regularization)
    jax.eval_shape(drop, state.params, state.key)
    if config.regularization.hidden_dropout and config.model.num_layers == 1:
        warn(
            "config.regularization.hidden_dropout is between layers: with one, use "
            "--config.regularization.output_dropout"
        )
    checkpoints = directory / workdir.CHECKPOINTS
    state, step, history = _restore_state(checkpoints, state, plan.total_steps)
    is_recorded = start.is_resumed and read_validation_loss(checkpoints, step) is not None
    is_validated = bool(parallel.max_over_processes(is_recorded))  # All must agree.
    return OpenRun(
        config=config,
        directory=directory,
        vocabulary=start.vocabulary,
        ids=ids,
        sizes=sizes,
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        plan=plan,
        first_state=state,
        first_step=step,
        history=history,
        checkpoints=CheckpointWriter(checkpoints),
        writer=metrics.MetricsWriter(directory / workdir.METRICS, step, watch),
        notes=start.notes,
        is_resumed=start.is_resumed,
        is_validated=is_validated,
        prints=parallel.is_first() and not quiet,
    )


def _make_plan(config: Config, length: int) -> Plan:
    """Return the steps of a run on a training text of `length` tokens."""
    order = batches.Order(length, config.batches, config.seed)
    total_steps = config.num_epochs * order.steps_per_epoch
    total_steps = min(total_steps, config.max_steps or total_steps)
    return Plan(
        order.steps_per_epoch,
        total_steps,
        config.validate_every_steps,
        config.log_every_steps,
        config.steps_per_call,
        config.batches.batch_size * config.batches.window_length,
        jax.jit(optimizer_lib.make_schedule(config.optimizer, total_steps)),  # Many operations.
    )


def _restore_state(
    checkpoints: Path, state: TrainState, total_steps: int
) -> tuple[TrainState, int, dict[str, int]]:
    """Return state, step and history of the latest checkpoint, else the given state."""
    restored = restore_latest(checkpoints, state.params, state.rest)
    if not restored:
        return state, 0, {}
    step, items = restored
    if step > total_steps:
        raise UserError(
            f"the run in {checkpoints.parent} has trained {step} steps already: raise "
            "--config.num_epochs or --config.max_steps, or use another --workdir"
        )
    return TrainState(params=items.params, **items.state), step, items.history
