"""Training: one jitted step, the loop around it, and what a run leaves behind."""

import contextlib
import ctypes
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from lstm_jax import batches, corpus, evaluate, metrics, recurrence, sample, workdir
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.progress import Progress
from lstm_jax.vocabulary import Vocabulary

# What a run may change when it goes on: none of these touches the arrays it has.
_CHANGEABLE = (
    "num_epochs",
    "sample.length",
    "sample.temperature",
    # Other ways to compute the same.
    "model.recurrence",
    "model.dtype",
    "model.rematerialize",
    # The text may have moved; that it is the same, its checksum tells.
    "data.path",
    "data.directory",
)

# Options of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class TrainState(NamedTuple):
    """Everything that a training step reads and writes.

    Attributes:
      params: the model's parameters.
      optimizer: the optimizer's state.
      carry: after the last batch.
      key: PRNG key that whatever is random in training follows from, with the step.
      loss_sum: float32 [], nats per token, summed over the steps since it was last logged.
    """

    params: model_lib.Params
    optimizer: optax.OptState
    carry: model_lib.Carry
    key: jax.Array
    loss_sum: jax.Array


TrainStep = Callable[[TrainState, batches.Batch], TrainState]


def make_optimizer(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with the learning rate and clipping of the `optimizer` fields."""
    peak = optimizer.learning_rate
    falling = max(total_steps - optimizer.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, falling),
    }[optimizer.schedule]
    warmup = optax.linear_schedule(0.0, peak, optimizer.warmup_steps)
    schedule = optax.join_schedules([warmup, after], [optimizer.warmup_steps])
    adam = optax.adam(schedule)
    if not optimizer.max_gradient_norm:
        return adam
    return optax.chain(optax.clip_by_global_norm(optimizer.max_gradient_norm), adam)


def init_state(
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int,
) -> TrainState:
    """The state before the first step."""
    init_key, key = jax.random.split(key)
    params = model_lib.init(model, init_key)
    carry = model.initial_carry(batch_size)
    return TrainState(params, optimizer.init(params), carry, key, jnp.zeros(()))


def make_train_step(
    model: model_lib.LanguageModel, optimizer: optax.GradientTransformation
) -> TrainStep:
    """The jitted training step. It donates the state that it is given."""

    def loss_and_carry(
        params: model_lib.Params, batch: batches.Batch, carry: model_lib.Carry
    ) -> tuple[jax.Array, model_lib.Carry]:
        logits, carry = model_lib.apply(model, params, batch.inputs, carry)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return losses.mean(), carry

    def train_step(state: TrainState, batch: batches.Batch) -> TrainState:
        carry = jax.tree.map(lambda x: jnp.where(batch.starts, 0, x), state.carry)
        (loss, carry), gradients = jax.value_and_grad(loss_and_carry, has_aux=True)(
            state.params, batch, carry
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, carry, state.key, state.loss_sum + loss)

    return jax.jit(train_step, donate_argnums=0)


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


class _StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) within its block into a request; a second one ends all.

    Attributes:
      exit_code: None until a signal came, then what the command is to exit with.
    """

    exit_code: int | None = None

    def __enter__(self) -> "_StopRequest":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is not None:
            raise KeyboardInterrupt
        self.exit_code = 128 + number


def train(config: ConfigDict, directory: Path) -> int:
    """Trains the model that `config` describes, or goes on where the run in `directory` stopped.

    Args:
      config: a complete config (`config.complete`).
      directory: the working directory.

    Returns:
      The exit code: 0, or 130 after Ctrl-C (143 after SIGTERM) with everything saved.

    Raises:
      UserError: for a text that can't be had or is too short, and for a working directory that
        holds another run or can't be written.
    """
    try:
        recurrence.choose(config.model.recurrence, config.model.dtype)
    except ValueError as error:
        raise UserError(f"config.model.recurrence: {error}") from None
    keep_freed_memory()
    splits = corpus.read(config.data)
    config, vocabulary = _settle(config, splits, directory)
    ids = {name: vocabulary.encode(text) for name, text in splits.items()}
    iterator, steps_per_epoch = batches.make(ids["train"], config.batches, config.seed)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        workdir.write_text(directory / workdir.VOCABULARY, vocabulary.to_json())
        workdir.write_text(directory / workdir.CONFIG, config_lib.to_json(config))
    except OSError as error:
        raise UserError(f"can't write to {directory}: {error.strerror}") from None

    model = model_lib.from_config(config.model, len(vocabulary))
    with workdir.open_checkpoints(directory) as checkpoints:
        run = _Run(config, directory, checkpoints, model, vocabulary, ids, steps_per_epoch)
        optimizer = make_optimizer(config.optimizer, run.total_steps)
        state = init_state(model, optimizer, jax.random.key(config.seed), config.batches.batch_size)
        print(_describe(run, state.params), flush=True)
        start = checkpoints.latest_step() or 0
        if start >= run.total_steps:
            print(
                f"The run in {directory} is finished, with {start / steps_per_epoch:g} epochs. "
                f"To train longer, add for example --config.num_epochs={2 * config.num_epochs}"
            )
        else:
            if start:
                params, rest = workdir.restore(
                    checkpoints, start, state.params, _without_params(state), iterator
                )
                state = TrainState(params=params, **rest)
                print(f"Going on from step {start} of {run.total_steps}, saved in {directory}")
            exit_code = _loop(run, make_train_step(model, optimizer), state, iterator, start)
            if exit_code:
                return exit_code
        _finish(run)
    return 0


def _settle(
    config: ConfigDict, splits: dict[str, str], directory: Path
) -> tuple[ConfigDict, Vocabulary]:
    """The config and vocabulary to train with: new ones, or those of the run in `directory`.

    Raises:
      UserError: if that run had another config (but for `_CHANGEABLE`) or another text.
    """
    config = config.copy_and_resolve_references()
    corpus.check_unchanged(splits, config.data)
    config.data.sha256 = corpus.checksum(splits)
    if config.data.path:
        config.data.path = corpus.absolute(config.data.path)
    if not (directory / workdir.CONFIG).exists():
        return config, Vocabulary.from_text(splits["train"])
    before = dict(config_lib.flatten(workdir.load_config(directory)))
    differing = [
        f"{field} was {before[field]!r} and is {value!r}"
        for field, value in config_lib.flatten(config)
        if value != before[field] and field not in _CHANGEABLE
    ]
    if differing:
        raise UserError(
            f"{directory} holds a run with another config ({'; '.join(differing)}): "
            "go on with its own, or name another --workdir"
        )
    return config, workdir.load_vocabulary(directory)


def _describe(run: "_Run", params: model_lib.Params) -> str:
    """The model's parameters, the text's sizes, and its first window with the targets."""
    window = run.ids["train"][: min(run.config.batches.window_length, 24) + 1]
    inputs, targets = window[:-1], window[1:]
    counts = ", ".join(f"{len(ids):,} {name}" for name, ids in run.ids.items())
    return (
        f"{model_lib.parameter_table(params)}\n\n"
        f"characters: {counts}; vocabulary: {len(run.vocabulary)}; "
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
    checkpoints: ocp.CheckpointManager
    model: model_lib.LanguageModel
    vocabulary: Vocabulary
    ids: dict[str, np.ndarray]
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Steps until the end of the last epoch."""
        return self.config.num_epochs * self.steps_per_epoch

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one training step predicts."""
        return self.config.batches.batch_size * self.config.batches.window_length

    def plot(self) -> None:
        """Draws the curves of what was measured so far."""
        rows = metrics.read(self.directory / workdir.METRICS)
        metrics.plot(rows, self.directory / workdir.CURVES)


def _loop(
    run: _Run,
    train_step: TrainStep,
    state: TrainState,
    iterator: grain.DatasetIterator,
    start: int,
) -> int:
    """Trains from step `start` to the last; the exit code is not 0 if a signal ended it earlier."""
    if start == 0:
        # A run that ended before its first checkpoint starts over.
        for name in workdir.HISTORY:
            (run.directory / name).unlink(missing_ok=True)
    with (
        metrics.MetricsWriter(run.directory / workdir.METRICS, start) as writer,
        _StopRequest() as stop,
    ):
        if start == 0:
            _validate(run, writer, state, 0, show=print)
        with contextlib.closing(Progress(start, run.total_steps, run.steps_per_epoch)) as progress:
            for step in range(start + 1, run.total_steps + 1):
                state = train_step(state, next(iterator))
                if step == start + 1:
                    jax.block_until_ready(state.loss_sum)
                    progress.start_clock(step)  # From here on nothing compiles.
                if step % run.config.log_every_steps == 0:
                    loss = float(state.loss_sum) / run.config.log_every_steps
                    state = state._replace(loss_sum=jnp.zeros(()))
                    speed = run.tokens_per_step * progress.steps_per_second(step)
                    progress.update(step, loss, speed)
                    epoch = step / run.steps_per_epoch
                    writer.write(step, epoch, "train", loss, tokens_per_second=round(speed))
                end_of_epoch = step % run.steps_per_epoch == 0
                if end_of_epoch:
                    loss = _validate(run, writer, state, step, show=progress.print)
                    _save(run, state, iterator, step, loss)
                    run.plot()
                    progress.start_clock(step)
                if stop.exit_code:
                    if not end_of_epoch:
                        _save(run, state, iterator, step)
                    run.checkpoints.wait_until_finished()
                    progress.print(
                        f"\nStopped at step {step} of {run.total_steps}; all is saved in "
                        f"{run.directory}. The same command goes on from there."
                    )
                    return stop.exit_code
    run.checkpoints.wait_until_finished()
    return 0


def _validate(
    run: _Run,
    writer: metrics.MetricsWriter,
    state: TrainState,
    step: int,
    show: Callable[[str], None],
) -> float:
    """Measures the validation loss, lets the model write, shows and records both."""
    config = run.config
    epoch = step // run.steps_per_epoch
    loss = evaluate.mean_loss(run.model, state.params, run.ids["validation"])
    writer.write(step, epoch, "validation", loss)
    (text,) = _sample(run, state.params, jax.random.fold_in(state.key, step))
    with (run.directory / workdir.SAMPLES).open("a", encoding="utf-8") as file:
        file.write(f"=== step {step}, temperature {config.sample.temperature}\n{text}\n\n")
    name = f"epoch {epoch} of {config.num_epochs}" if step else "untrained"
    show(f"\n=== {name}: validation loss {evaluate.describe(loss)}\n{text}\n")
    return loss


def _save(
    run: _Run,
    state: TrainState,
    iterator: grain.DatasetIterator,
    step: int,
    validation_loss: float | None = None,
) -> None:
    workdir.save(
        run.checkpoints, step, state.params, _without_params(state), iterator, validation_loss
    )


def _without_params(state: TrainState) -> dict[str, Any]:
    """All of the state but the parameters, which a checkpoint holds by themselves."""
    fields = state._asdict()
    del fields["params"]
    return fields


def _finish(run: _Run) -> None:
    """Measures the best checkpoint on the test split, lets it write, and says what is where."""
    step = workdir.best_step(run.checkpoints)
    assert step is not None, "a run ends with a checkpoint"
    params = workdir.load_params(run.checkpoints, step, run.model)
    path = run.directory / workdir.METRICS
    measured = [row for row in metrics.read(path) if (row["split"], row["step"]) == ("test", step)]
    if measured:
        loss = measured[-1]["loss"]
    else:
        loss = evaluate.mean_loss(run.model, params, run.ids["test"])
        with metrics.MetricsWriter(path, run.checkpoints.latest_step()) as writer:
            writer.write(step, step / run.steps_per_epoch, "test", loss)
        run.plot()
    (text,) = _sample(run, params, jax.random.key(run.config.seed))
    print(
        f"\n{text}\n\n"
        f"Test loss of step {step}, the best by validation loss: {evaluate.describe(loss)}\n"
        f"Everything is in {run.directory}: {workdir.CHECKPOINTS}/, {workdir.METRICS}, "
        f"{workdir.SAMPLES}, {workdir.CURVES}, TensorBoard events\n"
        f"Let it write: python -m lstm_jax.sample --workdir {run.directory}"
    )


def _sample(run: _Run, params: model_lib.Params, key: jax.Array) -> list[str]:
    """One text of the length and temperature that the config says."""
    return sample.write(
        run.model,
        params,
        run.vocabulary,
        key,
        prompt="",
        length=run.config.sample.length,
        temperature=run.config.sample.temperature,
    )
