"""Open a run, new or resumed: its lock, text, checkpoint and history, ready for training."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, Unpack

import jax
import numpy as np

from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config, DataConfig
from lstm_jax.devices import feeding, hosts, memory
from lstm_jax.run import advice, checkpoints, lock, metrics, resume, workdir
from lstm_jax.run.files import name_failed_writes
from lstm_jax.run.loop import Loop
from lstm_jax.train_step import TrainState
from lstm_jax.vocabulary import Costs, Ids, Vocabulary

# Called with each row of metrics.jsonl, without its checksum and with the sample of a validation.
Watch = Callable[[metrics.Row], object]


class Splits(Protocol):
    """The splits of a text; see `data.texts.Splits`."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary of the training text."""

    def count_tokens(self, vocabulary: Vocabulary, /) -> np.ndarray:
        """Return the number of occurrences of each token there."""

    def resolve(self, data: DataConfig, /) -> DataConfig:
        """Return the fields with the checksum of the text and absolute paths."""

    def encode(self, vocabulary: Vocabulary, /) -> tuple[dict[str, Ids], dict[str, Costs]]:
        """Return the ids and the costs of each split."""


class Session:
    """An open run: nobody else writes to it, and it has a checkpoint of the step of its loop.

    Attributes:
      config, changes: the config, and its changes since the run was last trained.
      directory: the working directory.
      vocabulary, ids, costs: the vocabulary; the ids and the costs of each split.
      model, plan: the model, and when it is trained, validated and logged.
      iterator: over the training batches, or over their positions in the text.
      source: step and number of tokens of the model whose parameters a new run starts from.
      loop: where training is.
      checkpoints: writes them.
      is_resumed: whether the run was trained before.
      is_validated: whether its checkpoint had been validated.
      is_finished: whether its training is.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        splits: Splits,
        mesh: jax.sharding.Mesh | None,
        watch: Watch,
        check_lock: Callable[[], None],
    ) -> None:
        """Resolve the config, encode the text, and restore the state; see `open_run`."""
        self.directory, self._check_lock, self._watch = directory, check_lock, watch
        config = dataclasses.replace(config, data=splits.resolve(config.data))
        resolved = resume.resolve_run(config, directory, lambda: splits.vocabulary)
        self.config, self.vocabulary, self.changes = resolved
        self.ids, self.costs = splits.encode(self.vocabulary)
        saved_in = directory / workdir.CHECKPOINTS
        hosts.check_same(
            f"{lock.read_holder(directory)!r} {checkpoints.list_steps(saved_in)} "
            f"{self.config.to_dict()}",
            "config, text and working directory: start all with the same command",
        )
        ids, size = self.ids["train"], len(self.vocabulary)
        self._on_devices = mesh is not None and feeding.fits_on_device(ids, size)
        start = resume.restore_run(
            resolved, directory, ids, splits.count_tokens, mesh, only_offsets=self._on_devices
        )
        self.model, self.plan, self.iterator = start.model, start.plan, start.iterator
        self.source, self._history = start.source, start.history
        self.loop = Loop(start.state, start.step, start.plan.total_steps)
        self.checkpoints = checkpoints.CheckpointWriter(saved_in)
        self.is_resumed = start.history is not None
        self.is_validated = self.is_finished = False
        self._metrics: metrics.MetricsWriter | None = None

    def make_feed(self, mesh: jax.sharding.Mesh) -> feeding.Feed:
        """Return the training batches, on the devices of the mesh that the run was opened for."""
        ids, text = self.ids["train"], None
        if self._on_devices:
            text = feeding.place_text(ids, len(self.vocabulary), mesh)
        return feeding.Feed(self.iterator, mesh, text)

    def save(self, step: int, state: TrainState) -> None:
        """Start saving a checkpoint, with the sizes of the files that the run appends to."""
        self._check_lock()
        sizes = workdir.history_sizes(self.directory)
        self.checkpoints.save(step, state.evaluated, state.rest, self.iterator, sizes)

    def record(
        self,
        step: int,
        split: str,
        loss: float,
        sample: str | None = None,
        **extra: Unpack[metrics.Numbers],
    ) -> None:
        """Write a row of metrics, and pass it to `watch`; do nothing in other processes."""
        if self._metrics is None:
            return
        self._check_lock()
        if split != "train":
            bits = loss_lib.compute_bits_per_character(loss, [self.costs[split]])
            extra["bits_per_character"] = bits
        epoch = self.plan.count_epochs(step)
        row = self._metrics.write(step, epoch, split, loss, sample, **extra)
        self._watch(row if sample is None else {**row, "sample": sample})

    def record_training(
        self, step: int, loss: float, gradient_norm: float, skipped: int, tokens_per_second: float
    ) -> None:
        """Write a row of a mean training loss; the speed is 0 if it is unknown."""
        extra: metrics.Numbers = {
            "learning_rate": self.plan.get_learning_rate(step, skipped),
            "gradient_norm": gradient_norm,
        }
        if tokens_per_second:
            extra["tokens_per_second"] = round(tokens_per_second)
        self.record(step, "train", loss, **extra)

    def read_metrics(self) -> list[metrics.Row]:
        """Return the rows of metrics.jsonl."""
        return metrics.read_metrics(self.directory / workdir.METRICS)

    def is_out_of_patience(self) -> bool:
        """Return whether the validation loss has not improved for long; process 0 decides."""
        patience = self.config.patience
        if not patience:
            return False
        decides = hosts.is_first() and advice.is_out_of_patience(self.read_metrics(), patience)
        return bool(hosts.max_over_processes(decides))

    def load_best(self) -> tuple[model_lib.Params, int, float | None]:
        """Return the best parameters by validation loss, their step, and test loss if measured."""
        batch_size = self.config.batches.batch_size
        params, step = workdir.load_params(self.directory, self.model, batch_size)
        rows = self.read_metrics()
        losses = [row["loss"] for row in rows if (row["split"], row["step"]) == ("test", step)]
        return params, step, losses[-1] if losses else None

    @contextlib.contextmanager
    def _begin(self) -> Iterator[None]:
        """Make the files agree with the latest checkpoint, which a new run saves first.

        A checkpoint is saved before its validation, and what was recorded later is removed. So a
        run that was stopped in between, or killed at any time, has each row and sample once.
        """
        step = self.loop.step
        with self.checkpoints:
            if self._history is None:
                # Before any metrics: metrics without a checkpoint can't be resumed.
                self.save(step, self.loop.state)
                self.checkpoints.wait()
            else:
                saved_in = self.directory / workdir.CHECKPOINTS
                is_recorded = checkpoints.read_validation_loss(saved_in, step) is not None
                # A fast process may just have recorded it.
                self.is_validated = bool(hosts.max_over_processes(is_recorded))
                self.is_finished = self.is_validated and (
                    step == self.plan.total_steps or self.is_out_of_patience()
                )
                if not self.is_finished and hosts.is_first():
                    workdir.restore_history(self.directory, self._history)
            path = self.directory / workdir.METRICS
            with (
                metrics.MetricsWriter(path, step, self.config)
                if hosts.is_first()
                else contextlib.nullcontext() as self._metrics
            ):
                yield


@contextlib.contextmanager
def open_run(
    config: Config,
    directory: Path,
    load_splits: Callable[[], Splits],
    mesh: jax.sharding.Mesh | None = None,
    watch: Watch = lambda row: None,
) -> Iterator[Session]:
    """Open the run in `directory`, or a new one there, and close it at the end of the block.

    Args:
      config: a complete config, of a model that `resume.resolve_model` accepts.
      directory: the working directory, which all processes share.
      load_splits: loads the text.
      mesh: the devices; None for the default device, with batches on the host.
      watch: called with each recorded row, in process 0.

    Raises:
      UserError: if another process holds the run, or the processes of this one differ; if the text
        is another one or too short; or if the run is damaged, can't be written, or has another
        value of a field that can't change.
    """
    memory.keep_freed_memory()
    with contextlib.ExitStack() as stack:
        with hosts.main_process_first("text and lock"):
            splits = load_splits()
            check_lock = stack.enter_context(lock.hold_lock(directory))
        stack.enter_context(name_failed_writes(directory))
        run = Session(config, directory, splits, mesh, watch, check_lock)
        stack.enter_context(run._begin())
        yield run
