"""Training: one jitted step, the loop around it, and what a run leaves behind."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from lstm_jax import batches, generation
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.controls import Controls
from lstm_jax.data import sources, texts
from lstm_jax.devices import feeding, hosts, parallel
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError
from lstm_jax.run import checkpoints as checkpoints_lib
from lstm_jax.run import files, lock, metrics, workdir
from lstm_jax.run.profiler import Profiler
from lstm_jax.run.progress import Progress
from lstm_jax.train_step import TrainState, TrainStep, init_state, make_train_step
from lstm_jax.vocabulary import Ids, Vocabulary, make_printable

# What a run may change when it goes on: all of these leave the arrays it has as they are.
_CHANGEABLE = (
    "num_epochs",
    "steps_per_call",
    "log_every_steps",
    "checkpoint_every_seconds",
    "max_skipped_steps",
    "profile",
    "sample.length",
    "sample.temperature",
    # Other ways to compute the same.
    "model.recurrence",
    "model.dtype",
    "model.rematerialize",
    "optimizer.microbatches",
    "mesh.data",
    "mesh.model",
    # How fast it learns from here on; with num_epochs, where the schedule ends.
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.step_at",
    "optimizer.max_gradient_norm",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "batches.reset_probability",
    # What keeps it from learning by heart.
    "regularization.embedding_dropout",
    "regularization.input_dropout",
    "regularization.hidden_dropout",
    "regularization.output_dropout",
    "regularization.recurrent_dropout",
    "regularization.activation_penalty",
    "regularization.temporal_activation_penalty",
    # The text may have moved; that it is the same, its checksum tells.
    "data.path",
    "data.directory",
    "data.memory_megabytes",
    "data.prepared",
)

# Of the validation text, read from a zero state at the end.
_PLACES = 64

# Options of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets glibc keep what a training step on a CPU frees, for the next step to use.

    A step allocates tens to hundreds of megabytes. Had from the operating system anew each time,
    they cost a page fault for every 4 KiB: 3 % of a step at the sizes of experiments/shakespeare.py
    and 16 % at those of quick.py, measured by benchmarks/train_step.py with and without its call of
    this. Where the C library is not glibc, or the device no CPU, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() != "cpu" or mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def check_recurrence(config: ConfigDict) -> None:
    """Raises `UserError` if the device here can't compute `model.recurrence`; it starts JAX."""
    try:
        model_lib.make_model(config.model, 1).implementation()
    except ValueError as error:
        raise UserError(f"config.model.recurrence: {error}") from None


class _Stopped(BaseException):
    """A signal asked training to stop; no `except Exception` on its way may keep it."""


class _StopRequest:
    """Turns Ctrl-C (or SIGTERM) within its block into a request; more of them change nothing.

    Attributes:
      exit_code: None until a signal came, then what the command is to exit with.
    """

    exit_code: int | None = None
    _at_once = False

    def __enter__(self) -> "_StopRequest":
        # Python gives signals to the main thread only, and lets only that set handlers.
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `_Stopped` if a signal came, to whichever process."""
        (code,) = hosts.get_greatest(self.exit_code or 0)
        if code:
            self.exit_code = code
            raise _Stopped

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises `_Stopped` wherever it comes.

        Not so where there are other processes, which are not to be left at different steps.
        """
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once:
                self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is None:
            self.exit_code = 128 + number
            if self._at_once:
                raise _Stopped


class _Pacer:
    """Waits for the device about once a second.

    JAX hands steps to the device and runs ahead, by tens of them. To stop, all that were handed
    over must be waited for.
    """

    def __init__(self, step: int) -> None:
        """Starts when `step` steps are done; the next one is waited for."""
        self._step, self._steps, self._clock = step, 1, time.monotonic()

    def keep(self, step: int, array: jax.Array) -> bool:
        """Waits for `array`, which step `step` computes, if it is time to.

        Returns:
          Whether processes may agree on something now: all do so at the same steps.
        """
        if step - self._step < self._steps:
            return jax.process_count() == 1
        jax.block_until_ready(array)
        (milliseconds,) = hosts.get_greatest(int(1e3 * (time.monotonic() - self._clock)))
        self._steps = max(1, int(self._steps / max(milliseconds, 1) * 1e3))
        self._step, self._clock = step, time.monotonic()
        return True


def _ignore(row: Mapping[str, Any]) -> None:
    """Stands for nobody who wants to know."""


def train(
    config: ConfigDict,
    directory: Path | str,
    watch: Callable[[Mapping[str, Any]], object] = _ignore,
) -> int:
    """Trains the model that `config` describes, or goes on where the run in `directory` stopped.

    Args:
      config: a config, which is completed and checked (`config.complete_config`).
      directory: the working directory, which all processes see.
      watch: called with each loss after it was recorded, as a row of metrics.jsonl without its
        checksum: for example to draw it in a notebook. What it raises ends the run there, from
        where it can continue.

    Returns:
      The exit code: 0, or 130 after Ctrl-C (143 after SIGTERM) with everything saved.

    Raises:
      UserError: for a config that is none; for a text that can't be had or is too short; for a
        working directory that holds another run or a damaged one, is in use, or can't be written;
        for numbers that are no longer finite.
    """
    config, directory = config_lib.complete_config(config), Path(directory)
    parallel.use_cores(config)
    check_recurrence(config)
    mesh = parallel.make_mesh(config)
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if not hosts.is_first():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        with hosts.first_goes_ahead("text and lock"):
            splits = texts.load_texts(config.data)
            is_ours = stack.enter_context(_hold(directory))
        try:
            return _train(config, directory, splits, mesh, is_ours, watch)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UnavailableError(
                f"can't write to {error.filename or directory} ({error.strerror}): make room or "
                "make it writable, and the same command goes on from the last checkpoint"
            ) from None


def _hold(directory: Path) -> contextlib.AbstractContextManager[Callable[[], bool]]:
    """`lock.hold_lock`, which process 0 does for all."""
    if hosts.is_first():
        return lock.hold_lock(directory)
    if not directory.exists():
        raise UserError(
            f"process {jax.process_index()} does not see {directory}, where process 0 trains: name "
            "the same --workdir for all, on a disk that they share"
        )
    return contextlib.nullcontext(lambda: True)


def _train(
    config: ConfigDict,
    directory: Path,
    splits: texts.Splits,
    mesh: jax.sharding.Mesh,
    is_ours: Callable[[], bool],
    watch: Callable[[Mapping[str, Any]], object],
) -> int:
    """`train` in a directory whose lock is held."""
    workdir.check_own_files(directory)
    config, vocabulary, changes = _settle(config, splits, directory)
    ids = splits.encode(vocabulary)
    on_devices = feeding.fits_on_device(ids["train"], len(vocabulary))
    iterator, steps_per_epoch = batches.make_batches(
        ids["train"],
        config.batches,
        config.seed,
        places=on_devices,
        part=(jax.process_index(), jax.process_count()),
    )
    model = model_lib.make_model(config.model, len(vocabulary))
    saved_in = directory / workdir.CHECKPOINTS
    saved_steps = checkpoints_lib.list_steps(saved_in)
    started = bool(saved_steps)
    held = directory / lock.LOCK  # By process 0, whose directory is told from others by that.
    same = f"{held.read_bytes() if held.exists() else b''!r} {saved_steps} "
    same += config_lib.to_json(config)
    hosts.check_same(same, "config, text and working directory: start all with the same command")
    trained = (
        workdir.load_trained(Path(config.init_from)) if config.init_from and not started else None
    )
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.num_epochs * steps_per_epoch)
    state = init_state(
        model,
        optimizer,
        jax.random.key(config.seed),
        config.batches.batch_size,
        averaged=config.optimizer.average_decay > 0,
        trained=trained.params if trained else None,
        mesh=mesh,
        counts=None if started else splits.texts["train"].count_tokens(vocabulary),
    )
    restored = checkpoints_lib.restore_latest(saved_in, state.evaluated, state.rest, iterator)
    if restored is None and (directory / workdir.METRICS).exists():
        raise UserError(
            f"{directory} holds what a run measured ({workdir.METRICS}) but no checkpoint: bring "
            f"{workdir.CHECKPOINTS}/ back, or begin anew with another --workdir"
        )
    start = restored.step if restored else 0
    total_steps = config.num_epochs * steps_per_epoch
    if start > total_steps:
        raise UserError(
            f"the run in {directory} has trained {start / steps_per_epoch:g} epochs already, and "
            f"--config.num_epochs={config.num_epochs} is fewer: name more, or another --workdir"
        )
    with hosts.first_goes_ahead("config"):
        if hosts.is_first():
            files.remove_partial(directory)
            if changes:
                workdir.append_changes(directory, start, changes)
            workdir.save_vocabulary(directory, vocabulary)
            workdir.save_config(directory, config)
    with checkpoints_lib.CheckpointWriter(saved_in) as checkpoints:
        run = _Run(
            config,
            directory,
            checkpoints,
            model,
            vocabulary,
            splits.texts,
            ids,
            steps_per_epoch,
            mesh,
            is_ours,
            watch,
        )
        print(_describe(run, state.params), flush=True)
        if trained:
            print(_describe_start(config.init_from, trained, vocabulary), flush=True)
        for field, (before, after) in changes.items():
            print(f"From step {start} on, {field} is {after!r}; it was {before!r}", flush=True)
        if restored is None:
            _save(run, state, iterator, 0)
            checkpoints.wait()
        else:
            state = TrainState.join(restored.params, restored.state)
        if restored and start == run.total_steps and _is_validated(saved_in, start):
            print(
                f"The run in {directory} is finished, with {start / steps_per_epoch:g} epochs. "
                f"To train longer, add for example --config.num_epochs={2 * config.num_epochs}"
            )
        else:
            if restored:
                if hosts.is_first():
                    workdir.restore_history(directory, restored.history)
                print(f"Going on from step {start} of {run.total_steps}, saved in {directory}")
            train_step = make_train_step(model, optimizer, config, mesh)
            text = feeding.place_text(ids["train"], len(vocabulary), mesh) if on_devices else None
            feed = feeding.Feed(iterator, mesh, text)
            exit_code = _loop(run, train_step, state, feed, start)
            if exit_code:
                return exit_code
        _finish(run)
    return 0


def _is_validated(saved_in: Path, step: int) -> bool:
    return (saved_in / str(step) / checkpoints_lib.VALIDATION).exists()


def _settle(
    config: ConfigDict, splits: texts.Splits, directory: Path
) -> tuple[ConfigDict, Vocabulary, dict[str, tuple[Any, Any]]]:
    """The config and vocabulary to train with: new ones, or those of the run in `directory`.

    Returns:
      The config, the vocabulary, and what of the config has changed since: before and after.

    Raises:
      UserError: if that run had another config (but for `_CHANGEABLE`) or another text.
    """
    config = config.copy_and_resolve_references()
    config.data.sha256 = splits.sha256
    if config.data.path:
        config.data.path = sources.make_absolute(config.data.path)
    if config.data.prepared:
        config.data.prepared = str(Path(config.data.prepared).absolute())
    if config.init_from:
        config.init_from = str(Path(config.init_from).absolute())
    if not (directory / workdir.CONFIG).exists():
        for name in (workdir.CHECKPOINTS, workdir.METRICS):
            if (directory / name).exists():
                raise UserError(
                    f"{directory} holds {name} but no {workdir.CONFIG}: bring that back, or begin "
                    "anew with another --workdir"
                )
        vocabulary = splits.texts["train"].vocabulary(config.data)
        if config.init_from:
            source = Path(config.init_from)
            _compare(workdir.load_config(source), config, source, only="model.")
            vocabulary = workdir.load_vocabulary(source).extended(vocabulary)
        return config, vocabulary, {}
    before = workdir.load_config(directory)
    if not config.init_from:
        config.init_from = before.init_from
    changes = _compare(before, config, directory)
    return config, workdir.load_vocabulary(directory), changes


def _compare(
    before: ConfigDict, config: ConfigDict, directory: Path, only: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, before and after; raises `UserError` if one is not `_CHANGEABLE`.

    Args:
      before: the config of the run in `directory`.
      config: what is wanted now.
      directory: of that run.
      only: compare the fields with this prefix only.
    """
    old = dict(config_lib.flatten(before))
    changes = {
        field: (old[field], value)
        for field, value in config_lib.flatten(config)
        if field.startswith(only) and value != old[field]
    }
    refused = {f: values for f, values in changes.items() if f not in _CHANGEABLE}
    if "data.sha256" in refused:
        text = before.data.path or f"the dataset {before.data.dataset}"
        raise UserError(
            f"{directory} holds a run that was trained on another text ({text}): bring that back, "
            "or name another --workdir"
        )
    if refused and only:
        own = " ".join(f"--config.{field}={was!r}" for field, (was, _) in refused.items())
        raise UserError(f"the model in {directory} has other sizes: add {own}")
    if refused:
        listed = "; ".join(f"{f} was {was!r} and is {now!r}" for f, (was, now) in refused.items())
        raise UserError(
            f"{directory} holds a run with another config ({listed}): continue with its own, or "
            "name another --workdir"
        )
    return changes


def _describe_start(init_from: str, trained: workdir.Trained, vocabulary: Vocabulary) -> str:
    """Where the first weights come from, and which units they don't know."""
    new = vocabulary.tokens[len(trained.vocabulary) :]
    units = f"{len(new)} new units start fresh: {', '.join(map(repr, new))}" if new else "none new"
    return (
        f"The weights are those of step {trained.step} in {init_from}; of the vocabulary, {units}\n"
    )


def _describe(run: "_Run", params: model_lib.Params) -> str:
    """The model's parameters, the text's sizes, and its first window with the targets."""
    window = run.ids["train"][: min(run.config.batches.window_length, 24) + 1]
    inputs, targets = window[:-1], window[1:]
    counts = ", ".join(f"{len(ids):,} {name}" for name, ids in run.ids.items())
    return (
        f"{model_lib.format_parameters(params)}\n\n"
        f"{run.vocabulary.kind}: {counts}; vocabulary: {len(run.vocabulary)}; "
        f"steps an epoch: {run.steps_per_epoch:,}\n\n"
        f"The first window, and what to predict from it:\n"
        f"  inputs  {run.vocabulary.decode(inputs)!r}\n"
        f"  targets {run.vocabulary.decode(targets)!r}\n"
        f"  inputs  {' '.join(map(str, inputs))}\n"
        f"  targets {' '.join(map(str, targets))}\n"
    )


class _Run(NamedTuple):
    """What the training loop reads and never changes."""

    config: ConfigDict
    directory: Path
    checkpoints: checkpoints_lib.CheckpointWriter
    model: model_lib.LanguageModel
    vocabulary: Vocabulary
    texts: dict[str, texts.Text]
    ids: dict[str, Ids]
    steps_per_epoch: int
    mesh: jax.sharding.Mesh
    is_ours: Callable[[], bool]  # Whether the lock of the directory is still held.
    watch: Callable[[Mapping[str, Any]], object]  # Called with each loss that was recorded.

    @property
    def total_steps(self) -> int:
        """Steps until the end of the last epoch."""
        return self.config.num_epochs * self.steps_per_epoch

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one training step predicts."""
        return self.config.batches.batch_size * self.config.batches.window_length

    def steps_at_once(self, step: int) -> int:
        """How many steps the next call runs after `step`: none past a log line or an epoch."""
        number = self.config.steps_per_call
        stops = (self.config.log_every_steps, self.steps_per_epoch)
        return number if all(step % n + number <= n for n in stops) else 1

    def batch(self, step: int) -> batches.Batch:
        """What training step `step`, from 1 on, read."""
        ids, fields = self.ids["train"], self.config.batches
        places = batches.make_order(len(ids), fields, self.config.seed)[step - 1]
        return batches.cut_batch(ids, places, fields.window_length)

    def row(self, step: int, split: str, loss: float, **extra: float) -> dict[str, Any]:
        """A row of metrics.jsonl."""
        return metrics.make_row(step, step / self.steps_per_epoch, split, loss, **extra)

    def plot(self) -> None:
        """Draws the curves of what was measured so far."""
        rows = metrics.read_metrics(self.directory / workdir.METRICS)
        metrics.plot_metrics(rows, self.directory / workdir.CURVES)


def _loop(
    run: _Run,
    train_step: TrainStep,
    state: TrainState,
    feed: feeding.Feed,
    start: int,
) -> int:
    """Trains from step `start` to the last; the exit code is not 0 if a signal ended it earlier.

    At the end of an epoch the checkpoint is saved first and the validation follows: a run that was
    stopped in between goes on with that.
    """
    config, step, saved, saved_at = run.config, start, start, time.monotonic()
    pacer, together = _Pacer(start), True
    path, first = run.directory / workdir.METRICS, hosts.is_first()
    profiled = config.profile and first
    with (
        metrics.MetricsWriter(path, start) if first else contextlib.nullcontext() as writer,
        contextlib.closing(Profiler(run.directory if profiled else None, start)) as profiler,
        contextlib.closing(Progress(start, run.total_steps, run.steps_per_epoch)) as progress,
        _StopRequest() as stop,
    ):
        try:
            while True:
                if step % run.steps_per_epoch == 0:
                    _validate(run, writer, state, step, stop, progress.print)
                    progress.start_clock(step)
                if step == run.total_steps:
                    break
                if together:
                    stop.check()
                steps = run.steps_at_once(step)
                batch = feed.next(steps)
                # Whatever else the step would bring to the devices is a mistake.
                with jax.transfer_guard("disallow"):
                    state = train_step(state, batch)
                is_first, step = step == start, step + steps
                together = pacer.keep(step, state.loss_sum)
                profiler.keep(step, state.loss_sum)
                if is_first:
                    progress.start_clock(step)  # From here on little compiles.
                if step % config.log_every_steps == 0:
                    state = _check_finite(run, state)
                    if loss_steps := int(state.loss_steps):
                        loss = float(state.loss_sum) / loss_steps
                        speed = run.tokens_per_step * progress.steps_per_second(step)
                        progress.update(step, loss, speed)
                        row = run.row(step, "train", loss, tokens_per_second=round(speed))
                        if writer:
                            writer.write(**row)
                        run.watch(row)
                    state = state._replace(
                        loss_sum=_zero(state.loss_sum), loss_steps=_zero(state.loss_steps)
                    )
                saving = run.checkpoints.check()
                waited = time.monotonic() - saved_at >= config.checkpoint_every_seconds
                due = together and bool(hosts.get_greatest(waited and not saving)[0])
                if step % run.steps_per_epoch == 0 or due:
                    state = _check_finite(run, state)
                    _save(run, state, feed.iterator, step)
                    saved, saved_at = step, time.monotonic()
        except _Stopped:
            if saved != step:
                state = _check_finite(run, state)
                _save(run, state, feed.iterator, step)
            run.checkpoints.wait()
            progress.print(
                f"\nStopped at step {step} of {run.total_steps}; all is saved in "
                f"{run.directory}. The same command goes on from there."
            )
            return stop.exit_code or 0
    return 0


def _zero(array: jax.Array) -> jax.Array:
    """Zero, where a scalar is."""
    zero = np.zeros((), array.dtype)
    return jax.make_array_from_callback((), array.sharding, lambda part: zero[part])


def _check_finite(run: _Run, state: TrainState) -> TrainState:
    """Tells of steps left out because they were not finite.

    Raises:
      UserError: if there were more of them than `max_skipped_steps`.
    """
    first, skipped = int(state.first_skipped), int(state.skipped)
    if first:
        batch = run.batch(first)
        path = run.directory / f"nonfinite_step_{first}.json"
        ids = {"step": first, "inputs": batch.inputs.tolist(), "targets": batch.targets.tolist()}
        if hosts.is_first():
            files.write_file(path, f"{json.dumps(ids)}\n".encode())
        allowed = run.config.max_skipped_steps
        what = (
            f"a parameter, the loss or a gradient of step {first} is not finite (its batch is in "
            f"{path})"
        )
        if skipped > allowed:
            last = checkpoints_lib.list_steps(run.directory / workdir.CHECKPOINTS)[-1]
            raise NotFiniteError(
                f"{what}: the last good checkpoint is that of step {last}; go on from there with a "
                "lower --config.optimizer.learning_rate, --config.optimizer.max_gradient_norm=1, "
                f"or more than {allowed} in --config.max_skipped_steps"
            )
        print(f"warning: {what}; left out {skipped} of at most {allowed}", file=sys.stderr)
        state = state._replace(first_skipped=_zero(state.first_skipped))
    return state


def _validate(
    run: _Run,
    writer: metrics.MetricsWriter | None,
    state: TrainState,
    step: int,
    stop: _StopRequest,
    show: Callable[[str], None],
) -> None:
    """Measures the validation loss, lets the model write, shows and records both.

    Every process measures, so that none waits; the one that has a `writer` records.
    """
    config = run.config
    epoch = step // run.steps_per_epoch
    with stop.at_once():
        params, key = parallel.gather_on_one_device((state.evaluated, state.key), run.mesh)
        loss = loss_lib.compute_loss(run.model, params, run.ids["validation"])
        text = _sample(run, params, jax.random.fold_in(key, step))
    if writer is None:
        return
    row = run.row(step, "validation", loss)
    writer.write(**row)
    sample = f"=== step {step}, temperature {config.sample.temperature}\n{text}\n\n"
    with files.open_append(run.directory / workdir.SAMPLES) as file:
        file.write(sample.encode())
    run.checkpoints.record_validation(step, loss)
    if step:
        run.plot()
    name = f"epoch {epoch} of {config.num_epochs}" if step else "untrained"
    described = loss_lib.describe_loss(loss, run.vocabulary, run.texts["validation"])
    show(f"\n=== {name}: validation loss {described}\n{text}\n")
    if step and (warning := loss_lib.find_suspicion({"validation": loss}, len(run.vocabulary))):
        show(f"warning: {warning}\n")
    run.watch(row)


def _save(run: _Run, state: TrainState, iterator: grain.DatasetIterator, step: int) -> None:
    if not run.is_ours():
        raise UnavailableError(
            f"another process has taken {run.directory} over, since this one stood still for more "
            f"than {lock.STALE_SECONDS} seconds: nothing more is written"
        )
    sizes = workdir.history_sizes(run.directory)
    run.checkpoints.save(step, state.evaluated, state.rest, iterator, sizes)


def _finish(run: _Run) -> None:
    """Measures the best checkpoint on the test split, lets it write, and says what is where."""
    hosts.wait_for_all("all is saved")
    params, step = workdir.load_params(run.directory, run.model)
    path = run.directory / workdir.METRICS
    measured = [
        row for row in metrics.read_metrics(path) if (row["split"], row["step"]) == ("test", step)
    ]
    if measured:
        loss = measured[-1]["loss"]
    else:
        loss = loss_lib.compute_loss(run.model, params, run.ids["test"])
    if not hosts.is_first():
        return
    if not measured:
        latest = checkpoints_lib.list_steps(run.directory / workdir.CHECKPOINTS)[-1]
        row = run.row(step, "test", loss)
        with metrics.MetricsWriter(path, latest) as writer:
            writer.write(**row)
        run.plot()
        run.watch(row)
    described = loss_lib.describe_loss(loss, run.vocabulary, run.texts["test"])
    zero = loss_lib.measure_zero_state(run.model, params, run.ids["validation"], _PLACES)
    text = _sample(run, params, jax.random.key(run.config.seed))
    print(
        f"\n{text}\n\n"
        f"Test loss of step {step}, the best by validation loss: {described}\n"
        f"{zero.describe('validation')}\n"
        f"Everything is in {run.directory}: {workdir.CHECKPOINTS}/, {workdir.METRICS}, "
        f"{workdir.SAMPLES}, {workdir.CURVES}, TensorBoard events\n"
        f"Let it write: python -m lstm_jax.sample --workdir {run.directory}"
    )
    losses = {"test": loss}
    best = checkpoints_lib.read_validation_loss(run.directory / workdir.CHECKPOINTS, step)
    if best is not None:
        losses["validation"] = best
    if warning := loss_lib.find_suspicion(losses, len(run.vocabulary), zero):
        print(f"warning: {warning}", file=sys.stderr)


def _sample(run: _Run, params: model_lib.Params, key: jax.Array) -> str:
    """One text of the length and temperature that the config says."""
    (text,) = generation.generate_texts(
        run.model,
        params,
        run.vocabulary,
        key,
        length=run.config.sample.length,
        controls=Controls(temperature=run.config.sample.temperature),
        stop_token=False,
    )
    return make_printable(text)


if __name__ == "__main__":
    print("error: train with python -m lstm_jax.main --config FILE", file=sys.stderr)
    sys.exit(2)
