"""Open a run, new or resumed: its lock, text, checkpoint and history, ready for training."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

import jax
from tqdm import tqdm

from lstm_jax import batches
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config
from lstm_jax.data import files, texts
from lstm_jax.devices import feeding, hosts, memory, parallel
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import advice, checkpoints, distillation, lock, metrics, resume, workdir
from lstm_jax.run.loop import Loop
from lstm_jax.run.plan import Plan
from lstm_jax.train_step import TrainState, init_state


class Session:
    """An open run, which no other process writes to.

    When it has been opened, its latest checkpoint is at `loop.step`; a new run is still saving it.

    Attributes:
      prints: whether this process prints: the first one, unless the run is quiet.
      config, changes: the config, and its changes since the run was last trained.
      directory: the working directory.
      vocabulary, ids: the vocabulary, and the ids of each split.
      sizes: the sizes of validation and test text, without the first token.
      mesh: the devices that it trains on.
      model, plan: the model, and at which steps it is validated and logged.
      optimizer: the optimizer of its training steps.
      source: step and vocabulary size of the model whose parameters a new run starts from.
      loop: where training is.
      checkpoints, writer: write checkpoints, and metrics in process 0.
      is_resumed: whether the run was trained before.
      is_validated: whether its latest checkpoint had been validated when the run was opened.
      is_finished: whether its training is finished.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        watch: metrics.Watch,
        quiet: bool,
        opened: contextlib.ExitStack,
    ) -> None:
        """Open the run; `opened` closes its files and its lock at the end. See `open_run`."""
        self.prints = hosts.is_first() and not quiet
        self.mesh = parallel.make_mesh(config)  # Before anything is compiled.
        config = resume.resolve_model(config)
        memory.keep_freed_memory()
        with hosts.main_process_first("text and lock"):
            splits = texts.load_texts(config.data)
            self._check_lock = opened.enter_context(lock.hold_lock(directory))
        opened.enter_context(_name_failed_writes(directory, self._check_lock))
        self.directory, self._saved_in = directory, directory / workdir.CHECKPOINTS
        config = dataclasses.replace(config, data=splits.resolve(config.data))
        resolved = resume.resolve_run(config, directory, splits)
        self.config, self.vocabulary, self.changes = resolved
        self.ids, self.sizes = splits.encode(self.vocabulary)
        self.is_resumed = bool(steps := checkpoints.list_steps(self._saved_in))
        held = files.read_tail(directory / lock.LOCK, 2**10)  # It distinguishes directories.
        hosts.check_same(
            f"{held!r} {steps} {self.config.to_dict()}",
            "config, text and working directory: start all with the same command",
        )
        config, ids, size = self.config, self.ids["train"], len(self.vocabulary)
        self._on_devices = feeding.fits_on_device(ids) or bool(config.distill.teachers)
        if teachers := config.distill.teachers:
            distillation.check_length(len(ids), size)
            if not self.is_resumed or "distill.teachers" in self.changes:
                loaded = distillation.load_teachers(teachers, self.vocabulary)
                sha256 = loaded.config.data.sha256
                distillation.check_texts(teachers, sha256, config.data.sha256)
        order = batches.make_order(len(ids), config.batches, config.seed)
        self.plan = Plan(config, order.steps_per_epoch)
        self.model = model_lib.make_model(config.model, size, self.vocabulary.stop_id)
        starts_from = "" if self.is_resumed else config.init_from
        trained = workdir.load_trained(starts_from) if starts_from else None
        self.source = (trained.step, len(trained.vocabulary)) if trained else None
        self.optimizer = optimizer_lib.make_optimizer(config.optimizer, self.plan.total_steps)
        state = init_state(
            self.model,
            self.optimizer,
            jax.random.key(config.seed),
            config.batches.batch_size,
            averaged=optimizer_lib.has_average(config.optimizer),
            trained=trained.params if trained else None,
            mesh=self.mesh,
            counts=None if self.is_resumed else texts.count_ids(ids, size),
        )
        self._restore(state)
        self.is_validated = self.is_finished = False
        self._begin(opened)
        self.writer: metrics.MetricsWriter | None = None
        if hosts.is_first():
            path = directory / workdir.METRICS
            writer = metrics.MetricsWriter(path, self.loop.step, config, watch)
            self.writer = opened.enter_context(writer)

    def _restore(self, state: TrainState) -> None:
        """Start the loop at the latest checkpoint, else in this state."""
        directory, plan, step = self.directory, self.plan, 0
        restored = checkpoints.restore_latest(self._saved_in, state.evaluated, state.rest)
        if restored:
            step, items = restored
            self._history, state = items.history, TrainState.join(items.params, items.state)
        elif (directory / workdir.METRICS).exists():
            raise UserError(
                f"{directory} holds {workdir.METRICS} but no checkpoint: restore "
                f"{workdir.CHECKPOINTS}/, or start a new run in another working directory"
            )
        if step > plan.total_steps:
            limit = f"{plan.limit}={getattr(self.config, plan.limit)}"
            raise UserError(
                f"the run in {directory} has trained {plan.describe_length(step)} already, and "
                f"{limit} is fewer: set more, or use another working directory"
            )
        self.loop = Loop(state, step, plan.total_steps)

    def print(self, text: str) -> None:
        """Print to standard output, above the bar of progress, if this process prints."""
        if self.prints:
            with tqdm.external_write_mode(sys.stdout):
                print(text, flush=True)

    def make_feed(self) -> feeding.Feed:
        """Return the training batches from the loop's step, on the devices of the mesh."""
        ids, config, predictions = self.ids["train"], self.config, None
        if teachers := config.distill.teachers:
            trained = distillation.load_teachers(teachers, self.vocabulary)
            predictions = distillation.predict_text(trained, ids)
        on_devices, step = self._on_devices, self.loop.step
        return feeding.Feed(ids, config, self.mesh, step, on_devices, predictions)

    def save(self, step: int, state: TrainState) -> None:
        """Start saving a checkpoint, with the sizes of the files that the run appends to."""
        self._check_lock()
        sizes = workdir.measure_history(self.directory)
        # Arrays that every device has are saved from one, not in a part by each.
        params, rest = jax.tree.map(parallel.get_one_copy, (state.evaluated, state.rest))
        self.checkpoints.save(step, params, rest, sizes)

    def record(self, step: int, split: str, loss: float, **extra: Unpack[metrics.Extra]) -> None:
        """Write a row of metrics and pass it to `watch`, in process 0 only."""
        if self.writer is None:
            return
        self._check_lock()
        if split != "train":
            bits = loss_lib.compute_bits_per_character(loss, [self.sizes[split]])
            extra["bits_per_character"] = bits
        self.writer.write(step, self.plan.count_epochs(step), split, loss, **extra)

    def read_metrics(self) -> list[metrics.Row]:
        """Return the rows of metrics.jsonl."""
        return metrics.read_metrics(self.directory / workdir.METRICS)

    def ends_early(self) -> bool:
        """Return whether `patience` has ended the run, by its validation losses; process 0 decides.

        Rows of training, which may be later than the latest checkpoint, don't count.
        """
        patience = self.config.patience
        if not patience:
            return False
        decides = hosts.is_first() and advice.is_out_of_patience(self.read_metrics(), patience)
        return bool(hosts.max_over_processes(decides))

    def _begin(self, opened: contextlib.ExitStack) -> None:
        """Save the config, and make the files agree with the latest checkpoint.

        A new run saves its first checkpoint. A checkpoint is saved before its validation, and what
        was recorded later is removed. So a run that was stopped in between, or killed at any time,
        has each row and sample once. A finished run is not trained with a new config, so it keeps
        its own, unless only its text has moved.
        """
        directory, step = self.directory, self.loop.step
        if self.is_resumed:
            is_recorded = checkpoints.read_validation_loss(self._saved_in, step) is not None
            # A fast process may just have recorded it.
            self.is_validated = bool(hosts.max_over_processes(is_recorded))
            is_at_end = step == self.plan.total_steps
            self.is_finished = self.is_validated and (is_at_end or self.ends_early())
        if self.is_finished and not all(name.startswith("data.") for name in self.changes):
            self.changes = {}
        elif hosts.is_first():
            if self.changes:
                workdir.append_changes(directory, step, self.changes)
            workdir.save_vocabulary(directory, self.vocabulary)
            workdir.save_config(directory, self.config)
            if self.is_resumed and not self.is_finished:
                workdir.restore_history(directory, self._history)
        # After the config: checkpoints without one can't be resumed.
        self.checkpoints = opened.enter_context(checkpoints.CheckpointWriter(self._saved_in))
        if not self.is_resumed:
            # `Validate` waits for it: a run with metrics but no checkpoint can't be resumed.
            self.save(step, self.loop.state)


@contextlib.contextmanager
def open_run(
    config: Config, directory: Path, watch: metrics.Watch = lambda row: None, quiet: bool = False
) -> Iterator[Session]:
    """Open the run in `directory`, or a new one there, and close it at the end of the block.

    Args:
      config: a complete config.
      directory: the working directory, which all processes share.
      watch: called with each recorded row, in process 0.
      quiet: whether to print nothing but warnings, as all processes but the first do.

    Raises:
      UserError: if the config has no model or mesh for this machine; if another process holds the
        run, or the processes of this one differ; if the text is another one or too short; or if the
        run is damaged, can't be written, or has another value of a field that can't change.
    """
    with contextlib.ExitStack() as opened:
        yield Session(config, directory, watch, quiet, opened)


@contextlib.contextmanager
def _name_failed_writes(directory: Path, check_lock: Callable[[], None]) -> Iterator[None]:
    """Convert failed writes to the files of a run to `UnavailableError`."""
    try:
        yield
    except UnavailableError:
        check_lock()  # If the directory was moved, that is the reason.
        raise
    except OSError as error:
        # Not of the run: of `watch`, a closed pipe, another file.
        name = error.filename if isinstance(error.filename, str | bytes) else str(directory)
        path = Path(os.path.realpath(os.fsdecode(name)))
        is_elsewhere = not path.is_relative_to(os.path.realpath(directory))
        if is_elsewhere or hasattr(error, "is_of_watch") or isinstance(error, BrokenPipeError):
            raise
        check_lock()
        raise UnavailableError(
            f"can't write to {error.filename or directory} ({error.strerror}): free space or make "
            f"it writable, then resume from the last checkpoint with the same command"
        ) from None
