"""Train a model, from its text to the test loss: set up, restore, loop, validate, finish."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import jax
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config
from lstm_jax.controls import Controls
from lstm_jax.data import texts
from lstm_jax.devices import feeding, hosts, memory, parallel
from lstm_jax.errors import warn
from lstm_jax.run import advice, console, figures, lock, messages, metrics, plan, resume, workdir
from lstm_jax.run import checkpoints as checkpoints_lib
from lstm_jax.run.files import name_failed_writes
from lstm_jax.run.profiler import Profiler
from lstm_jax.run.progress import Progress
from lstm_jax.run.signals import Pacer, Stopped, StopRequest
from lstm_jax.run.zero_state import measure_zero_state
from lstm_jax.train_step import make_train_step

# See the argument of `train`.
Watch = Callable[[metrics.Row], object]

# Number of positions in the validation text that are read from a zero state after training.
_PLACES = 64


def train(
    config: Config | ConfigDict,
    directory: Path | str,
    watch: Watch = lambda row: None,
    quiet: bool = False,
) -> int:
    """Train the model that `config` describes, or resume the run in `directory`.

    Args:
      config: a config, which is completed and checked (`config.complete_config`).
      directory: the working directory, which all processes share.
      watch: called with each recorded loss, as a row of metrics.jsonl without its checksum, for
        example to plot it in a notebook; rows of validations also have the generated text, as
        `sample`. If it raises an exception, the run ends, and can be resumed.
      quiet: whether to print nothing, neither progress nor warnings.

    Returns:
      The exit code: 0, or 130 after Ctrl-C (143 after SIGTERM) with everything saved.

    Raises:
      UserError: if the config is invalid; the text can't be read or is too short; the working
        directory holds another run or a damaged one, is in use, or can't be written; or the
        loss, a gradient or a parameter is not finite.
    """
    complete, directory = config_lib.complete_config(config), workdir.check_path(directory)
    parallel.use_cores(complete)
    with console.quieten(quiet), contextlib.ExitStack() as stack:
        complete = resume.settle_model(complete)
        mesh = parallel.make_mesh(complete)
        memory.keep_freed_memory()
        with hosts.first_goes_ahead("text and lock"):
            splits = texts.load_texts(complete.data)
            check_lock = stack.enter_context(lock.hold_lock(directory))
        stack.enter_context(name_failed_writes(directory))
        run = _Run(complete, directory, splits, mesh, check_lock, watch)
        with run.checkpoints:
            return run.train() or run.finish()


class _Run:
    """A run that holds its lock: its fixed settings, and the state that training changes."""

    # ---- Set up and restore.

    def __init__(
        self,
        config: Config,
        directory: Path,
        splits: texts.Splits,
        mesh: jax.sharding.Mesh,
        check_lock: Callable[[], None],
        watch: Watch,
    ) -> None:
        text = splits.texts["train"]
        config = dataclasses.replace(config, data=splits.settle(config.data))
        settled = resume.settle_run(config, directory, lambda: text.vocabulary(config.data))
        self.config, self.vocabulary = settled.config, settled.vocabulary
        self.directory, self.saved_in = directory, directory / workdir.CHECKPOINTS
        self.mesh, self.check_lock, self.watch = mesh, check_lock, watch
        self.is_first = hosts.is_first()
        self.ids = splits.encode(self.vocabulary)
        self.validation_ids = plan.cut_validation(self.config, self.ids)
        self.costs = splits.measure_costs(self.vocabulary)
        hosts.check_same(
            f"{lock.read_holder(directory)!r} {checkpoints_lib.list_steps(self.saved_in)} "
            f"{self.config.to_dict()}",
            "config, text and working directory: start all with the same command",
        )
        ids = self.ids["train"]
        self.on_devices = feeding.fits_on_device(ids, len(self.vocabulary))
        start = resume.restore_run(
            settled, directory, ids, text.count_tokens, mesh, places=self.on_devices
        )
        self.model, self.state, self.step = start.model, start.state, start.step
        self.iterator, self.history = start.iterator, start.history
        self.plan, self.total_steps = start.plan, start.plan.total_steps
        self.checkpoints = checkpoints_lib.CheckpointWriter(self.saved_in)
        self.saved, self.saved_at = start.step, time.monotonic()
        messages.print_setup(settled, start, self.ids)

    # ---- The loop.

    def train(self) -> int:
        """Train to the last step; return 0, or the exit code of a signal that ended it earlier.

        The checkpoint of an epoch is saved before it is validated, so that a run that is stopped in
        between resumes with the validation.
        """
        config, directory = self.config, self.directory
        recorded = checkpoints_lib.read_validation_loss(self.saved_in, self.step) is not None
        validated = bool(hosts.get_greatest(recorded))  # A fast process may just have recorded it.
        if self.history is None:
            self._save()
            self.checkpoints.wait()
        elif validated and (self.step == self.total_steps or self._is_out_of_patience()):
            print(messages.describe_end(directory, config, self.plan, self.step))
            return 0
        else:
            if self.is_first:
                workdir.restore_history(directory, self.history)
            print(f"Resuming from step {self.step} of {self.total_steps}, saved in {directory}")
        optimizer = optimizer_lib.make_optimizer(config.optimizer, self.total_steps)
        train_step = make_train_step(self.model, optimizer, config, self.mesh)
        text = None
        if self.on_devices:
            text = feeding.place_text(self.ids["train"], len(self.vocabulary), self.mesh)
        feed = feeding.Feed(self.iterator, self.mesh, text)
        first_step, in_step = self.step, True
        # A checkpoint may have been validated where the plan, if it has changed, does not.
        validates = validated or self.plan.validates_at(self.step)
        profiled = directory if config.profile and self.is_first else None
        with (
            metrics.MetricsWriter(directory / workdir.METRICS, self.step, config)
            if self.is_first
            else contextlib.nullcontext() as self.writer,
            contextlib.closing(Profiler(profiled, self.step)) as profiler,
            contextlib.closing(
                Progress(self.step, self.total_steps, self.plan.steps_per_epoch)
            ) as self.progress,
            StopRequest() as stop,
        ):
            pacer = Pacer(self.step)
            try:
                while True:
                    if validates:
                        self._validate(stop)
                        self.progress.start_clock(self.step)
                        if self.step < self.total_steps and self._is_out_of_patience():
                            early = messages.describe_early_end(config, self.plan, self.step)
                            self.progress.print(early)
                            self.progress.finish(self.step)
                            return 0
                    if self.step == self.total_steps:
                        return 0
                    if in_step:
                        stop.check()
                    steps = self.plan.count_steps_of_call(self.step)
                    batch = feed.next(steps)
                    traced = jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1)
                    # The step must not transfer anything else to the devices.
                    with jax.transfer_guard("disallow"), traced:
                        self.state = train_step(self.state, batch)
                    self.step += steps
                    # Processes agree on signals and checkpoints only when all are at one step.
                    in_step = pacer.keep(self.step, self.state.loss_sum)
                    profiler.keep(self.step, self.state.loss_sum)
                    if self.step == first_step + steps:  # The first call compiled it.
                        self.progress.start_clock(self.step)
                    if self.step % config.log_every_steps == 0:
                        self._log()
                    saving = self.checkpoints.check()
                    waited = time.monotonic() - self.saved_at >= config.checkpoint_every_seconds
                    due = in_step and bool(hosts.get_greatest(waited and not saving))
                    validates = self.plan.validates_at(self.step)
                    if validates or due:
                        self._save()
            except Stopped:
                if self.saved != self.step:
                    self._save()
                self.checkpoints.wait()
                self.progress.print(messages.describe_stop(directory, self.plan, self.step))
                return stop.exit_code or 0

    def _log(self) -> None:
        """Record the mean training loss of the steps since the last record."""
        self._check_finite()
        state = self.state
        if number := int(state.loss_steps):
            loss = float(state.loss_sum) / number
            numbers: metrics.Numbers = {
                "learning_rate": self.plan.get_learning_rate(self.step, int(state.skipped)),
                "gradient_norm": float(state.norm_sum) / number,
            }
            tokens_per_step = self.config.batches.batch_size * self.config.batches.window_length
            if speed := self.progress.steps_per_second(self.step) * tokens_per_step:
                numbers["tokens_per_second"] = round(speed)
            self.progress.update(self.step, loss, speed)
            self._record(self.step, "train", loss, **numbers)
        sums = (state.loss_sum, state.norm_sum, state.loss_steps)
        loss_sum, norm_sum, loss_steps = map(parallel.make_zero_like, sums)
        self.state = state._replace(loss_sum=loss_sum, norm_sum=norm_sum, loss_steps=loss_steps)

    def _check_finite(self) -> None:
        """Report skipped steps; raise `NotFiniteError` if there are more than allowed."""
        if first := int(self.state.first_skipped):
            skipped, last = int(self.state.skipped), checkpoints_lib.list_steps(self.saved_in)[-1]
            messages.report_nonfinite(
                self.directory, self.config, self.ids["train"], first, skipped, last
            )
            zero = parallel.make_zero_like(self.state.first_skipped)
            self.state = self.state._replace(first_skipped=zero)

    def _save(self) -> None:
        """Start saving a checkpoint, after checking that all numbers are finite."""
        self._check_finite()
        self.check_lock()
        sizes = workdir.history_sizes(self.directory)
        state = self.state
        self.checkpoints.save(self.step, state.evaluated, state.rest, self.iterator, sizes)
        self.saved, self.saved_at = self.step, time.monotonic()

    def _record(
        self,
        step: int,
        split: str,
        loss: float,
        sample: str | None = None,
        **extra: Unpack[metrics.Numbers],
    ) -> None:
        if self.writer:
            self.check_lock()
            if split != "train":
                bits = loss_lib.compute_bits_per_character(loss, [self.costs[split]])
                extra["bits_per_character"] = bits
            epoch = self.plan.count_epochs(step)
            row = self.writer.write(step, epoch, split, loss, sample, **extra)
            self.watch(row if sample is None else {**row, "sample": sample})

    # ---- Validate.

    def _validate(self, stop: StopRequest) -> None:
        """Measure the validation loss and generate a sample; print and record both."""
        with stop.at_once():  # Every process measures, so that none waits for another.
            wanted = self.state.evaluated, self.state.key
            params, key = parallel.gather_on_one_device(wanted, self.mesh)
            loss = loss_lib.compute_loss(self.model, params, self.validation_ids)
            text = self._sample(params, jax.random.fold_in(key, self.step))
        if not self.is_first:
            return
        self._record(self.step, "validation", loss, text)
        temperature = self.config.sample.temperature
        workdir.append_sample(self.directory, self.step, temperature, text)
        self.checkpoints.record_validation(self.step, loss)
        done, total = map(self.plan.count_epochs, (self.step, self.total_steps))
        name = f"epoch {round(done, 2):g} of {round(total, 2):g}" if self.step else "untrained"
        described = self._describe_loss(loss, "validation")
        self.progress.print(f"\n=== {name}: validation loss {described}\n{text}\n")
        if self.step:
            self._plot_curves()
            if warning := advice.find_suspicion({"validation": loss}, len(self.vocabulary)):
                self.progress.print(f"warning: {warning}\n")

    def _is_out_of_patience(self) -> bool:
        """Return whether to end early, by the rows of metrics.jsonl; the first process decides."""
        used = self.is_first and self.config.patience
        rows = metrics.read_metrics(self.directory / workdir.METRICS) if used else []
        return bool(hosts.get_greatest(advice.is_out_of_patience(rows, self.config.patience)))

    def _plot_curves(self) -> None:
        rows = metrics.read_metrics(self.directory / workdir.METRICS)
        figures.plot_metrics(rows, self.directory / workdir.CURVES)

    def _sample(self, params: model_lib.Params, key: jax.Array) -> str:
        (text,) = generation.generate_texts(
            self.model,
            params,
            self.vocabulary,
            key,
            length=self.config.sample.length,
            controls=Controls(temperature=self.config.sample.temperature),
            stop_token=False,
        )
        return console.make_printable(text)

    def _describe_loss(self, loss: float, split: str) -> str:
        return messages.describe_loss(loss, self.vocabulary.token_name, self.costs[split])

    # ---- Finish.

    def finish(self) -> int:
        """Measure the best checkpoint on the test split, sample from it, and list the files."""
        hosts.wait_for_all("all is saved")
        batch_size = self.config.batches.batch_size
        params, step = workdir.load_params(self.directory, self.model, batch_size)
        path = self.directory / workdir.METRICS
        rows = metrics.read_metrics(path)
        measured = [row["loss"] for row in rows if (row["split"], row["step"]) == ("test", step)]
        if measured:
            loss = measured[-1]
        else:
            loss = loss_lib.compute_loss(self.model, params, self.ids["test"])
        if not self.is_first:
            return 0
        if not measured:
            latest = checkpoints_lib.list_steps(self.saved_in)[-1]
            with metrics.MetricsWriter(path, latest) as self.writer:
                self._record(step, "test", loss)
            self._plot_curves()
        described = self._describe_loss(loss, "test")
        zero = measure_zero_state(self.model, params, self.ids["validation"], _PLACES)
        print(
            f"\n{self._sample(params, jax.random.key(self.config.seed))}\n\n"
            f"Test loss at step {step}, the step with the best validation loss: {described}"
        )
        if sentence := advice.advise(rows):
            print(sentence)
        print(messages.list_files(self.directory, self.config.model))
        best = checkpoints_lib.read_validation_loss(self.saved_in, step)
        losses = {"test": loss, "validation": best}
        if warning := advice.find_suspicion(losses, len(self.vocabulary), zero):
            warn(warning)
        return 0
