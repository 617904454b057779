"""Train a model: from a config to the test loss, in one function.

`train_step.py` has the step, and `run/messages.py` what is printed.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lstm_jax import batches, budget, cells
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import CHANGEABLE, Config
from lstm_jax.data import texts
from lstm_jax.devices import mesh as mesh_lib
from lstm_jax.devices import processes
from lstm_jax.errors import NotFiniteError, UserError, make_command
from lstm_jax.run import distillation, messages, metrics, workdir
from lstm_jax.run.checkpoints import CheckpointWriter, restore_latest
from lstm_jax.run.interrupts import Stopped, StopRequest
from lstm_jax.run.run import GenerateOptions, Run, load
from lstm_jax.train_step import TrainState, init_state, make_train_step
from lstm_jax.vocabulary import Vocabulary

# JAX dispatches steps asynchronously; a run that stops first waits for all of them.
# In jaxlib 0.10.2, all-reduces between the CPU devices of a process deadlock, and XLA aborts it, if
# a step is dispatched while 32 computations are in flight on one of the devices.
_STEPS_BETWEEN_WAITS = 16
_SECONDS_TO_START = 3  # Of imports before `train`, which belong to the minutes of a run.
_FEW_STEPS = 300  # With fewer, a model has hardly learned to spell.


def train(
    config: Config | ConfigDict,
    directory: Path | str,
    watch: metrics.Watch = lambda row: None,
    quiet: bool = False,
) -> Run:
    """Train the model that `config` describes, or resume the run in `directory`.

    Args:
      config: a config, which is completed and checked (`config.complete_config`).
      directory: the working directory, which all processes share.
      watch: called with each recorded loss, as a row of metrics.jsonl, for example to plot it in a
        notebook; rows of validations also have the generated text, as `sample`. If it raises an
        exception, the run ends, and can be resumed.
      quiet: whether to print nothing.

    Returns:
      The trained model, as `load` does: the checkpoint with the best validation loss. The rows of
      metrics.jsonl are its `metrics`.

    Raises:
      UserError: if the config is invalid; the text can't be read or is too short; the working
        directory holds another run or a damaged one, is in use, or can't be written; or the
        loss, a gradient or a parameter is not finite.
      Stopped: a `KeyboardInterrupt`, after Ctrl-C or SIGTERM, with everything saved.
    """
    config, directory = config_lib.complete_config(config), workdir.expand_path(directory)
    deadline = time.monotonic() + 60 * config.minutes - _SECONDS_TO_START
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))  # The caller may have enabled it.
        # An empty mesh, instead of one that the caller may have set.
        stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        cells.load_cell(config.model.cell)
        if config.open:
            config = budget.choose_tokens(config, directory)

        # The text, and the run or model that this one starts from.
        with processes.main_process_first("text and lock"):
            splits = texts.load_texts(config.data)
            holder = stack.enter_context(workdir.hold_lock(directory))
        config = dataclasses.replace(config, data=texts.resolve_text(config.data, splits))
        initial_params, notes = None, list[str]()
        if is_resumed := workdir.has_run(directory):
            config, notes = change_config(config, directory)
            vocabulary = workdir.load_vocabulary(directory)
        elif config.init_from:
            vocabulary, initial_params, notes = load_initial(config, splits["train"])
        else:
            vocabulary = splits["train"].make_vocabulary(config.data)
        processes.check_same(f"{holder} {is_resumed} {config.to_dict()}")
        with processes.main_process_first("ids"):
            ids, sizes = texts.encode_splits(splits, vocabulary)

        # The model and its state.
        if config.open:
            config, line = budget.choose_fields(config, vocabulary, ids, deadline)
            notes.append(line)
        mesh = mesh_lib.make_mesh(config)
        steps_per_epoch = batches.count_steps(len(ids["train"]), config.batches)
        total_steps = config.num_epochs * steps_per_epoch
        # Unless `patience` ends training earlier.
        total_steps = min(total_steps, config.max_steps or total_steps)
        validate_every = config.validate_every_steps or steps_per_epoch
        model = model_lib.make_model(config.model, len(vocabulary), vocabulary.stop_id)
        optimizer = optimizer_lib.make_optimizer(config.optimizer, total_steps)
        schedule = jax.jit(optimizer_lib.make_schedule(config.optimizer, total_steps))
        counts = None if is_resumed else texts.count_ids(ids["train"], len(vocabulary))
        state = init_state(model, optimizer, config, initial_params, counts).place(mesh)
        step, is_validated, file_sizes = 0, False, dict[str, int]()
        checkpoint_path = directory / workdir.CHECKPOINTS
        if is_resumed:
            latest = restore_latest(checkpoint_path, state.params, state.rest)
            step, items, is_validated, file_sizes = latest
            if step > total_steps:
                raise UserError(
                    f"the run in {directory} has trained {step} steps already: raise "
                    "--config.num_epochs or --config.max_steps, or use another --workdir"
                )
            state = TrainState(params=items.params, **items.state)
        # Training longer removes the test loss, and may have ended before its first step.
        is_over = step == total_steps or find_reason_to_stop(directory, config)
        is_finished = bool(is_over) and bool(read_losses(directory, "test"))
        if is_finished:
            notes = [
                f"The run in {directory} is finished, at step {step}: to train longer, raise "
                "--config.num_epochs, --config.max_steps or --config.patience"
            ]
        elif is_resumed:
            notes.append(f"Resuming from step {step} of {total_steps}, saved in {directory}")
        elif total_steps < _FEW_STEPS and not (config.max_steps or config.init_from):
            notes.append(
                f"{total_steps} steps are few: for a short text, --config experiments/minutes.py:1 "
                "chooses better settings (docs/choosing.md)"
            )

        def show(text: str) -> None:
            """Print to standard output, in process 0 only."""
            # The same Ctrl-C may have ended `tee`, which reads the output: the run saves anyway.
            with contextlib.suppress(BrokenPipeError):
                if processes.is_first() and not quiet:
                    print(text, flush=True)

        setup = messages.describe_setup(config.batches, vocabulary, ids, model.dtype, mesh)
        show("\n".join([messages.format_parameters(state.params), "", setup, *notes]))
        sampling: GenerateOptions = {
            "length": config.sample.length,
            "temperature": config.sample.temperature,
            "seed": config.seed,
            "stop_token": False,
        }

        if not is_finished:  # A finished run keeps its config.
            train_step = make_train_step(model, optimizer, config, mesh)
            predictions = None
            if config.distill.teachers:
                show("The teachers predict the training text")
                predictions = distillation.predict_text(config, vocabulary, ids["train"])
            feed = mesh_lib.feed_batches(ids["train"], config, mesh, step, predictions)
            tokens_per_step = config.batches.batch_size * config.batches.window_length
            progress = messages.Progress(total_steps, tokens_per_step, show)
            checkpoints = CheckpointWriter(checkpoint_path, config.checkpoint_every_seconds)
            if processes.is_first():  # After the last check of the input.
                workdir.truncate_history(directory, file_sizes)
                workdir.save_fields(directory, config, vocabulary)
                writer = stack.enter_context(metrics.MetricsWriter(directory, step, watch))

            def record(step: int, split: str, loss: float, **extra: Any) -> None:
                """Write a row of metrics and pass it to `watch`, in process 0 only."""
                if split != "train":
                    bits = loss_lib.compute_bits_per_character(loss, sizes[split])
                    extra["bits_per_character"] = bits
                if processes.is_first():
                    writer.write(step, step / steps_per_epoch, split, loss, **extra)

            def log(state: TrainState, step: int) -> TrainState:
                """Record the mean training loss since the last row; return a state without it."""
                number = int(state.loss_steps)
                loss, norm = float(state.loss_sum) / number, float(state.norm_sum) / number
                speed = progress.report(step, step / steps_per_epoch, loss)
                extra = {"tokens_per_second": round(speed)} if speed else {}  # Else it is unknown.
                rate = float(f"{float(schedule(step - 1)):.6g}")  # In the six digits of float32.
                record(step, "train", loss, learning_rate=rate, gradient_norm=norm, **extra)
                return state.clear_sums()

            def validate(state: TrainState, step: int) -> str:
                """Record the validation loss and a sample; return a reason to stop, or ""."""
                params = mesh_lib.get_local_copy(state.params)
                loss = loss_lib.compute_loss(model, params, ids["validation"])
                run = Run(config, vocabulary, model, params, step)
                sample = messages.make_printable(run.generate(**sampling))
                if processes.is_first():
                    record(step, "validation", loss, sample=sample)
                    workdir.append_sample(directory, step, config.sample.temperature, sample)
                    checkpoints.record_validation(step, loss)
                    rows, epochs = workdir.read_metrics(directory), total_steps / steps_per_epoch
                    loss_text = messages.describe_loss(loss, vocabulary, sizes["validation"])
                    title = messages.describe_validation(rows, epochs, loss_text)
                    show(f"\n=== {title}\n{sample}\n")
                return find_reason_to_stop(directory, config)

            with StopRequest() as stop:
                if not is_resumed:  # A run that is killed in this validation resumes from step 0.
                    checkpoints.save(step, state.params, state.rest)
                reason = find_reason_to_stop(directory, config)
                if not is_validated and (not step % validate_every or step == total_steps):
                    reason = validate(state, step)
                while step < total_steps and not reason:
                    batch = next(feed)
                    # The batch is on the devices already: any transfer here is a mistake.
                    with jax.transfer_guard("disallow"):
                        state = train_step(state, batch)
                    step += 1
                    progress.after_step(step, state.loss_sum)
                    logs = not step % config.log_every_steps
                    validates = not step % validate_every or step == total_steps
                    if logs or validates or not step % _STEPS_BETWEEN_WAITS:
                        jax.block_until_ready(state.loss_sum)
                    elif jax.process_count() > 1:
                        continue  # Processes may be at different steps, and could not agree.
                    stops = processes.max_over_processes(stop.code)
                    saves = validates or stops or checkpoints.is_due()
                    if logs or saves:
                        raise_if_not_finite(state, step, checkpoints.last_step)
                    if logs:
                        state = log(state, step)
                    if saves:
                        checkpoints.save(step, state.params, state.rest)
                    if stops:
                        break
                    if validates:  # After the save: a run that is killed in it resumes from here.
                        reason = validate(state, step)
                        progress.stop_clock()
                if reason and step < total_steps:
                    show(f"Training ends at step {step} of {total_steps}: {reason}")
                if code := processes.max_over_processes(stop.code):
                    if processes.is_first():
                        metrics.plot_metrics(directory)
                    show(
                        f"\nStopped at step {step} of {total_steps}. Everything is saved in "
                        f"{directory}: the same command resumes."
                    )
                    raise Stopped(code)

        # The test loss of the best checkpoint.
        sync_global_devices("all is saved")
        run = load(directory)
        if not is_finished:
            record(run.step, "test", loss_lib.compute_loss(run.model, run.params, ids["test"]))
        if processes.is_first():
            metrics.plot_metrics(directory)
            step, loss = read_losses(directory, "test").popitem()
            sample = messages.make_printable(run.generate(**sampling))
            loss_text = messages.describe_loss(loss, vocabulary, sizes["test"])
            cell = config.model.cell
            own = ["--cell", cell] if cells.names_file(cell) else []
            command = make_command("sample", "--workdir", str(directory), *own)
            show(
                f"\n{sample}\n\n"
                f"Test loss at step {step}, the step with the best validation loss: "
                f"{loss_text}\n"
                f"Everything is in {directory}: {workdir.CHECKPOINTS}/, {workdir.METRICS}, "
                f"{workdir.SAMPLES}, {workdir.CURVES}, TensorBoard events\n"
                f"Generate text: {command}"
            )
        return run


def change_config(config: Config, directory: Path) -> tuple[Config, list[str]]:
    """Return the config of a run that resumes, and a line about each field that has changed.

    Raise `UserError` if a field that is not in `CHANGEABLE` has.
    """
    previous = workdir.load_config(directory)
    config = dataclasses.replace(config, init_from=config.init_from or previous.init_from)
    changes = config_lib.list_changes(previous, config)
    if any(name not in CHANGEABLE for name, _, _ in changes):
        differences = "; ".join(
            f"{name} was {was!r} and is {now!r}"
            for name, was, now in changes
            if name not in CHANGEABLE or name == "data.path"  # Which names the other text.
        )
        raise UserError(
            f"{directory} holds a run with another config or text ({differences}): resume with "
            "its values, or begin anew: use another --workdir, or remove that directory"
        )
    return config, [f"{name} is now {now!r}; it was {was!r}" for name, was, now in changes]


def load_initial(
    config: Config, text: texts.Text
) -> tuple[Vocabulary, model_lib.Params, list[str]]:
    """Return vocabulary and parameters of `config.init_from`, and a line about them.

    The vocabulary also has the new tokens of the training text. Raise `UserError` if the model has
    other sizes.
    """
    source = load(config.init_from)
    for field, theirs, ours in config_lib.list_changes(source.config, config):
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
    examples = f": {', '.join(map(repr, new[:10]))}" if new else ""
    note = (
        f"The initial weights are those of step {source.step} in {config.init_from}; "
        f"{len(new)} new tokens{examples}"
    )
    return vocabulary, source.params, [note]


def read_losses(directory: Path, split: str) -> dict[int, float]:
    """Return the losses in metrics.jsonl of a split by step."""
    rows = workdir.read_metrics(directory)
    return {row["step"]: row["loss"] for row in rows if row["split"] == split}


def find_reason_to_stop(directory: Path, config: Config) -> str:
    """Return why training ends before its last step, or "".

    The rows of metrics.jsonl decide, in process 0: a run that was stopped or killed and has resumed
    has the same rows as one that was not, so both end at the same step.
    """
    if not (patience := config.patience):
        return ""  # Without reading the file.
    losses = [*read_losses(directory, "validation").values()] if processes.is_first() else []
    is_over = patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])
    reason = f"the validation loss has not improved for {patience} validations"
    return reason if processes.max_over_processes(is_over) else ""


def raise_if_not_finite(state: TrainState, step: int, last_step: int) -> None:
    """Raise `NotFiniteError` if a parameter, or a loss or gradient since the last row, is not."""
    numbers = {"params": state.params, "loss": state.loss_sum, "norm": state.norm_sum}
    if not jax.jit(model_lib.is_finite)(numbers):
        raise NotFiniteError(
            f"the loss, a gradient or a parameter is not finite at step {step}: resume from the "
            f"last good checkpoint, that of step {last_step}, with a lower "
            "--config.optimizer.learning_rate"
        )
