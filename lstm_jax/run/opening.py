"""Open a run, new or resumed: its text, model, latest checkpoint and files, ready for training."""

import contextlib
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from lstm_jax import batches
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config
from lstm_jax.data import files, texts
from lstm_jax.devices import hosts, parallel
from lstm_jax.errors import UnavailableError, UserError, warn
from lstm_jax.run import distillation, metrics, resume, workdir
from lstm_jax.run.checkpoints import (
    CheckpointWriter,
    list_steps,
    read_validation_loss,
    restore_latest,
)
from lstm_jax.train_step import TrainState, init_state
from lstm_jax.vocabulary import Ids, TextSize, Vocabulary

_LOCK = ".lock"  # A file in the working directory.


class Plan:
    """The steps of a run with this config, for a text with this number of steps per epoch.

    Raise `UserError` if there are too many.

    Attributes:
      steps_per_epoch: the number of steps per epoch.
      total_steps: the number of steps until the end of the run, unless `patience` ends it earlier.
      limit: the field that determines it, "num_epochs" or "max_steps".
      tokens_per_step: the number of tokens of a step.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self._config, self.steps_per_epoch = config, steps_per_epoch
        self.total_steps, self.limit = config.num_epochs * steps_per_epoch, "num_epochs"
        if 0 < config.max_steps < self.total_steps:
            self.total_steps, self.limit = config.max_steps, "max_steps"
        if self.total_steps >= 2**31:  # Steps are counted in int32.
            raise UserError(
                f"the run would have {self.total_steps:,} steps, more than 2,147,483,647: lower "
                "config.num_epochs, or set config.max_steps"
            )
        self.tokens_per_step = config.batches.batch_size * config.batches.window_length
        # Jitted, because a schedule is many operations.
        self._schedule = jax.jit(optimizer_lib.make_schedule(config.optimizer, self.total_steps))

    def count_epochs(self, step: int) -> float:
        """Return the number of passes over the training text after `step` steps."""
        return step / self.steps_per_epoch

    def describe_length(self, step: int) -> str:
        """Return how long a run is after `step` steps, in the unit of its limit."""
        if self.limit == "max_steps":
            return f"{step} steps"
        return f"{round(self.count_epochs(step), 4):g} epochs"

    def validates_at(self, step: int) -> bool:
        """Return whether the run saves and validates after `step` steps, which may be 0."""
        every = self._config.validate_every_steps or self.steps_per_epoch
        return not step % every or not step % self.steps_per_epoch or step == self.total_steps

    def count_steps_of_call(self, step: int) -> int:
        """Return the number of steps of the next call, which must not cross a log or validation."""
        number, log_every = self._config.steps_per_call, self._config.log_every_steps
        inside = range(step + 1, step + number)
        return 1 if any(not n % log_every or self.validates_at(n) for n in inside) else number

    def get_learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1, in the six digits of float32."""
        return float(f"{float(self._schedule(step - 1)):.6g}")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run, new or at its latest checkpoint, whose lock is held.

    Attributes:
      config, changes: the config, and its changes since the run was last trained.
      directory: the working directory.
      vocabulary, ids: the vocabulary, and the ids of each split.
      sizes: the sizes of validation and test text, without the first token.
      mesh: the devices that it trains on.
      model, optimizer, plan: the model, its optimizer, and the steps of the run.
      first_state, first_step: the training state at the start, whose arrays the first step donates,
        and its number of steps.
      checkpoints, writer: write checkpoints, and metrics in process 0.
      source: step and vocabulary size of the model whose parameters a new run starts from.
      is_resumed: whether the run was trained before.
      is_validated: whether its latest checkpoint has been validated.
      is_finished: whether its training is finished.
      prints: whether this process prints: the first one, unless the run is quiet.
    """

    config: Config
    changes: resume.Changes
    directory: Path
    vocabulary: Vocabulary
    ids: dict[str, Ids]
    sizes: dict[str, TextSize]
    mesh: Mesh
    model: model_lib.LanguageModel
    optimizer: optax.GradientTransformation
    plan: Plan
    first_state: TrainState
    first_step: int
    checkpoints: CheckpointWriter
    writer: metrics.MetricsWriter | None
    source: tuple[int, int] | None
    is_resumed: bool
    is_validated: bool
    is_finished: bool
    prints: bool

    def print(self, text: str) -> None:
        """Print to standard output, above the bar of progress, if this process prints."""
        if self.prints:
            with tqdm.external_write_mode(sys.stdout):
                print(text, flush=True)

    def warn(self, text: str) -> None:
        """Log a warning, above the bar of progress."""
        with tqdm.external_write_mode(sys.stderr):
            warn(text)

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
    mesh = parallel.make_mesh(config)  # Before anything is compiled.
    config = resume.resolve_model(config)
    with contextlib.ExitStack() as stack:
        with hosts.main_process_first("text and lock"):
            splits = texts.load_texts(config.data)
            stack.enter_context(_hold_lock(directory))
        config = dataclasses.replace(config, data=splits.resolve(config.data))
        config, vocabulary, changes = resume.resolve_run(config, directory, splits)
        ids, sizes = splits.encode(vocabulary)
        checkpoint_directory = directory / workdir.CHECKPOINTS
        is_resumed = bool(list_steps(checkpoint_directory))
        _check_processes(config, directory)
        if config.distill.teachers and (not is_resumed or "distill.teachers" in changes):
            distillation.check_teachers(config, vocabulary)
        order = batches.make_order(len(ids["train"]), config.batches, config.seed)
        plan = Plan(config, order.steps_per_epoch)
        model = model_lib.make_model(config.model, len(vocabulary), vocabulary.stop_id)
        optimizer = optimizer_lib.make_optimizer(config.optimizer, plan.total_steps)
        state, source = _make_first_state(config, model, optimizer, mesh, ids["train"], is_resumed)
        state, step, history = _restore_state(config, directory, plan, state)
        is_recorded = is_resumed and read_validation_loss(checkpoint_directory, step) is not None
        # A fast process may just have recorded it.
        is_validated = bool(hosts.max_over_processes(is_recorded))
        is_at_end = step == plan.total_steps
        is_finished = is_validated and (is_at_end or is_out_of_patience(config, directory))
        if is_finished and not all(name.startswith("data.") for name in changes):
            changes = {}  # A finished run keeps its config, except where its text is.
        elif hosts.is_first():
            kept = None if is_finished else history
            _write_files(config, directory, vocabulary, step, changes, kept)
        yield OpenRun(
            config=config,
            changes=changes,
            directory=directory,
            vocabulary=vocabulary,
            ids=ids,
            sizes=sizes,
            mesh=mesh,
            model=model,
            optimizer=optimizer,
            plan=plan,
            first_state=state,
            first_step=step,
            # After the config: checkpoints without one can't be resumed.
            checkpoints=stack.enter_context(CheckpointWriter(checkpoint_directory)),
            writer=stack.enter_context(_open_metrics(config, directory, step, watch)),
            source=source,
            is_resumed=is_resumed,
            is_validated=is_validated,
            is_finished=is_finished,
            prints=hosts.is_first() and not quiet,
        )


@contextlib.contextmanager
def _hold_lock(directory: Path) -> Iterator[None]:
    """Make `directory` and hold its lock, for all processes of a run.

    The operating system releases it with the process, however it ends. On a file system without
    locks, nothing is locked. Raise `UnavailableError` if a process of another run holds it, or the
    directory can't be written.
    """
    if not hosts.is_first():
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / _LOCK).open("a+")
    except OSError as error:
        raise UnavailableError(f"can't write to {directory}: {error.strerror}") from None
    with file:
        try:
            files.lock_file(file.fileno())
        except BlockingIOError:
            file.seek(0)
            raise UnavailableError(
                f"another process is training in {directory} ({file.read().strip()}): wait until "
                "it ends, stop it, or use another working directory"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
        yield


def _check_processes(config: Config, directory: Path) -> None:
    """Raise `UserError` in all processes if they don't train the same run."""
    lock = directory / _LOCK
    held = lock.read_text() if lock.exists() else ""  # It distinguishes directories.
    steps = list_steps(directory / workdir.CHECKPOINTS)
    hosts.check_same(f"{held!r} {steps} {config.to_dict()}")


def _make_first_state(
    config: Config,
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ids: Ids,
    is_resumed: bool,
) -> tuple[TrainState, tuple[int, int] | None]:
    """Return the state before the first step, and step and vocabulary size of `init_from`."""
    trained = (
        workdir.load_trained(config.init_from) if config.init_from and not is_resumed else None
    )
    state = init_state(
        model,
        optimizer,
        jax.random.key(config.seed),
        config.batches.batch_size,
        trained=trained.params if trained else None,
        mesh=mesh,
        counts=None if is_resumed else texts.count_ids(ids, model.vocabulary_size),
    )
    return state, (trained.step, len(trained.vocabulary)) if trained else None


def _restore_state(
    config: Config, directory: Path, plan: Plan, state: TrainState
) -> tuple[TrainState, int, dict[str, int] | None]:
    """Return state, step and history of the latest checkpoint, else the given state.

    Raise `UserError` if there are metrics but no checkpoint, or it is beyond the last step.
    """
    restored = restore_latest(directory / workdir.CHECKPOINTS, state.params, state.rest)
    if not restored:
        if (directory / workdir.METRICS).exists():
            raise UserError(
                f"{directory} holds {workdir.METRICS} but no checkpoint: restore "
                f"{workdir.CHECKPOINTS}/, or start a new run in another working directory"
            )
        return state, 0, None
    step, items = restored
    if step > plan.total_steps:
        raise UserError(
            f"the run in {directory} has trained {plan.describe_length(step)} already, and "
            f"{plan.limit}={getattr(config, plan.limit)} is fewer: set more, or use another "
            "working directory"
        )
    return TrainState(params=items.params, **items.state), step, items.history


def is_out_of_patience(config: Config, directory: Path) -> bool:
    """Return whether `patience` has ended a run, by its validation losses; process 0 decides."""
    rows = metrics.read_metrics(directory / workdir.METRICS) if hosts.is_first() else []
    losses = [row["loss"] for row in rows if row["split"] == "validation"]
    is_over = 0 < config.patience < len(losses) and (
        min(losses[-config.patience :]) >= min(losses[: -config.patience])
    )
    return bool(hosts.max_over_processes(is_over))


def _write_files(
    config: Config,
    directory: Path,
    vocabulary: Vocabulary,
    step: int,
    changes: resume.Changes,
    history: dict[str, int] | None,
) -> None:
    """Write the config, its changes and the vocabulary; remove what is later than `history`."""
    if changes:
        workdir.append_changes(directory, step, changes)
    workdir.save_vocabulary(directory, vocabulary)
    workdir.save_config(directory, config)
    if history is not None:
        workdir.restore_history(directory, history)


def _open_metrics(
    config: Config, directory: Path, step: int, watch: metrics.Watch
) -> AbstractContextManager[metrics.MetricsWriter | None]:
    """Return the writer of metrics, in process 0 only."""
    if not hosts.is_first():
        return contextlib.nullcontext()
    return metrics.MetricsWriter(directory / workdir.METRICS, step, config, watch)
