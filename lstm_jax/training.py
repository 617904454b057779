"""Train a model: the loop, with what it logs, saves and validates, up to the test loss.

`run/opening.py` opens the run, new or resumed; `train_step.py` has the step.
"""

import time
from pathlib import Path
from typing import Unpack

import jax
import numpy as np
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config
from lstm_jax.devices import parallel
from lstm_jax.errors import NotFiniteError, make_command
from lstm_jax.generation import Controls
from lstm_jax.run import cell_file, distillation, messages, metrics, workdir
from lstm_jax.run.interrupts import Stopped, StopRequest
from lstm_jax.run.library import Run
from lstm_jax.run.opening import OpenRun, open_run
from lstm_jax.run.progress import Progress, describe_setup, describe_validation
from lstm_jax.train_step import TrainState, make_train_step

_SECONDS_BETWEEN_PLOTS = 10  # Plotting takes a tenth of a second, while the devices wait.


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
    complete, directory = config_lib.complete_config(config), workdir.expand_path(directory)
    with (
        jax.enable_x64(False),  # The caller may have enabled it.
        # The caller may have set a mesh: this is none.
        jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())),
        open_run(complete, directory, watch, quiet) as run,
    ):
        done = is_finished(run)
        run.print(describe_setup(run, done))
        if not done:  # A finished run keeps its config.
            take_steps(run)
        return finish_run(run)


def is_finished(run: OpenRun) -> bool:
    """Return whether the run has taken its last step, and recorded its last validation."""
    step = run.first_step
    if not run.is_validated or not (step == run.plan.total_steps or is_out_of_patience(run)):
        return False
    # A resume with more epochs removes this row, and may have ended before its first step.
    is_recorded = parallel.is_first() and bool(find_losses(run, "validation", step))
    return bool(parallel.max_over_processes(is_recorded))


def find_losses(run: OpenRun, split: str, step: int) -> list[float]:
    """Return the losses in metrics.jsonl of a split after `step` steps."""
    rows = run.read_metrics()
    return [row["loss"] for row in rows if (row["split"], row["step"]) == (split, step)]


def write_files(run: OpenRun) -> None:
    """Write config and vocabulary, and remove what is later than the checkpoint, in process 0."""
    if parallel.is_first():
        workdir.restore_history(run.directory, run.history)
        workdir.save_fields(run.directory, run.config, run.vocabulary)


def is_out_of_patience(run: OpenRun) -> bool:
    """Return whether the last `patience` > 0 validations did not improve on those before.

    A run that was stopped or killed and has resumed has the same rows as one that was not, so both
    end at the same step. Process 0 decides.
    """
    if not (number := run.config.patience):
        return False  # Without reading the file.
    rows = run.read_metrics() if parallel.is_first() else []
    losses = [row["loss"] for row in rows if row["split"] == "validation"]
    is_over = number < len(losses) and min(losses[-number:]) >= min(losses[:-number])
    return bool(parallel.max_over_processes(is_over))


def take_steps(run: OpenRun) -> None:
    """Take training steps until the last, or until `patience` or a signal ends them.

    Raise `Stopped` after a signal, when the state is saved.
    """
    config, plan = run.config, run.plan
    state, step, is_over = run.first_state, run.first_step, False
    train_step = make_train_step(run.model, run.optimizer, config, run.mesh)
    feed, pacer, progress = make_feed(run), parallel.Pacer(step), Progress(plan, run.print)
    compiled = set[int]()  # Numbers of steps in a call.
    write_files(run)  # Now that no mistake is left.
    with StopRequest() as stop:
        if not run.is_resumed:  # A run that is killed in this validation resumes from step 0.
            save(run, state, step)
        # Resuming removes the row of a validation, which follows its checkpoint: validate again.
        if run.is_validated or plan.validates_at(step):
            is_over = validate(run, state, step)
        while step < plan.total_steps and not is_over:
            steps = plan.count_steps_of_call(step)
            batch = feed.next(steps)
            with jax.transfer_guard("disallow"):  # Any other transfer to the devices is an error.
                state = train_step(state, batch)
            step += steps
            if steps not in compiled:
                progress.stop_clock()
                compiled.add(steps)
            progress.after_step(step, state.loss_sum)
            is_synchronized = pacer.wait(step, state.loss_sum)
            code = parallel.max_over_processes(stop.code) if is_synchronized else 0
            # What happens at certain steps ends a call: `Plan.count_steps_of_call`.
            logs, validates = step % config.log_every_steps == 0, plan.validates_at(step)
            saves = validates or code or (is_synchronized and is_save_due(run))
            if logs or saves:
                raise_if_not_finite(run, state, step)
            if logs:
                state = log(run, state, step, progress)
            if saves:
                save(run, state, step)
            if code:
                break
            if validates:  # After the save: a run that is killed in it resumes from here.
                is_over = validate(run, state, step)
                progress.stop_clock()
        if code := parallel.max_over_processes(stop.code):
            run.checkpoints.wait()
            plot_curves(run)
            run.print(
                f"\nStopped at step {step} of {plan.total_steps}. Everything is saved in "
                f"{run.directory}: the same command resumes."
            )
            raise Stopped(code)


def make_feed(run: OpenRun) -> parallel.Feed:
    """Return the training batches from the run's first step, on the devices of its mesh."""
    ids, config, predictions = run.ids["train"], run.config, None
    on_devices = not parallel.max_over_processes(not parallel.fits_on_device(ids))
    if config.distill.teachers:
        run.print("The teachers predict the training text")
        teachers = distillation.load_teachers(config, run.vocabulary)
        predictions, on_devices = distillation.predict_text(teachers, ids), True
    return parallel.Feed(ids, config, run.mesh, run.first_step, on_devices, predictions)


def is_save_due(run: OpenRun) -> bool:
    """Return whether the last save is old; each process has its own clock, so they agree on it."""
    age = time.monotonic() - run.checkpoints.last_time
    is_due = age >= run.config.checkpoint_every_seconds and not run.checkpoints.is_saving
    return bool(parallel.max_over_processes(is_due))


def raise_if_not_finite(run: OpenRun, state: TrainState, step: int) -> None:
    """Raise `NotFiniteError` if a parameter, or a loss or gradient since the last row, is not."""
    numbers = {"params": state.params, "loss": state.loss_sum, "norm": state.norm_sum}
    if not jax.jit(model_lib.is_finite)(numbers):
        run.checkpoints.wait()
        raise NotFiniteError(
            f"the loss, a gradient or a parameter is not finite at step {step}: resume from the "
            f"last good checkpoint, that of step {run.checkpoints.last_step}, with a lower "
            "--config.optimizer.learning_rate"
        )


def log(run: OpenRun, state: TrainState, step: int, progress: Progress) -> TrainState:
    """Record the mean training loss since the last row; return the state with sums of zero."""
    number = int(state.loss_steps)
    loss, speed = float(state.loss_sum) / number, progress.measure_speed(step)
    progress.print(step, loss, speed)
    extra: metrics.Extra = {
        "learning_rate": run.plan.get_learning_rate(step),
        "gradient_norm": float(state.norm_sum) / number,
    }
    if speed:  # Otherwise it is unknown.
        extra["tokens_per_second"] = round(speed)
    record(run, step, "train", loss, **extra)
    return state.clear_sums()


def record(
    run: OpenRun, step: int, split: str, loss: float, **extra: Unpack[metrics.Extra]
) -> None:
    """Write a row of metrics and pass it to `watch`, in process 0 only."""
    if split != "train":
        bits = loss_lib.compute_bits_per_character(loss, [run.sizes[split]])
        extra["bits_per_character"] = bits
    if parallel.is_first():
        run.writer.write(step, run.plan.count_epochs(step), split, loss, **extra)


def save(run: OpenRun, state: TrainState, step: int) -> None:
    """Start saving a checkpoint, with the sizes of the files that the run appends to."""
    arrays = state.params, state.rest
    if jax.process_count() == 1:  # Save arrays that every device has from one, not in parts.
        arrays = jax.tree.map(
            lambda x: x.addressable_data(0) if x.is_fully_replicated else x, arrays
        )
    run.checkpoints.save(step, *arrays, workdir.measure_history(run.directory))


def validate(run: OpenRun, state: TrainState, step: int) -> bool:
    """Record the validation loss and a sample; return whether `patience` ends training."""
    params, key = parallel.get_local_copy((state.params, state.key))
    loss = loss_lib.compute_loss(run.model, params, run.ids["validation"])
    sample = generate_sample(run, params, jax.random.fold_in(key, step))
    run.checkpoints.wait()  # The row may end the run: this checkpoint must exist by then.
    if parallel.is_first():
        record(run, step, "validation", loss, sample=sample)
        workdir.append_sample(run.directory, step, run.config.sample.temperature, sample)
        run.checkpoints.record_validation(step, loss)
    if run.prints:
        run.print(f"\n=== {describe_validation(run, step, loss)}\n{sample}\n")
    if step == run.plan.total_steps:
        return False  # `finish_run` plots.
    is_over = is_out_of_patience(run)
    if is_over:
        run.print(
            f"Training ends at step {step} of {run.plan.total_steps}: the validation loss has not "
            f"improved for {run.config.patience} validations"
        )
    elif step:
        plot_curves(run, _SECONDS_BETWEEN_PLOTS)
    return is_over


def generate_sample(run: OpenRun, params: model_lib.Params, key: jax.Array) -> str:
    """Return a text that the model generates, as a terminal can show it."""
    (text,) = generation.generate_texts(
        run.model,
        params,
        run.vocabulary,
        key,
        length=run.config.sample.length,
        controls=Controls(temperature=run.config.sample.temperature),
        stop_token=False,
    )
    return messages.make_printable(text)


def plot_curves(run: OpenRun, seconds: float = 0) -> None:
    """Plot the losses of metrics.jsonl, unless the plot is less than `seconds` old."""
    path = run.directory / workdir.CURVES
    age = time.time() - path.stat().st_mtime if path.exists() else seconds
    if parallel.is_first() and not 0 <= age < seconds:
        metrics.plot_metrics(run.read_metrics(), path)


def finish_run(run: OpenRun) -> Run:
    """Measure the best checkpoint on the test split, and return the trained model."""
    run.checkpoints.wait()
    parallel.wait_for_all("all is saved")
    shapes = model_lib.get_param_shapes(run.model)
    params, step = workdir.load_params(run.directory, shapes)
    config = workdir.load_config(run.directory)
    losses = find_losses(run, "test", step)
    loss = losses[-1] if losses else loss_lib.compute_loss(run.model, params, run.ids["test"])
    if parallel.is_first():
        if not losses:
            record(run, step, "test", loss)
        plot_curves(run)
        # On a device, as in `validate`: else the function that generates would be compiled again.
        key = jax.device_put(jax.random.key(run.config.seed), jax.local_devices()[0])
        described = messages.describe_loss(loss, run.vocabulary.token_name, run.sizes["test"])
        command = make_command("sample", "--workdir", str(run.directory))
        run.print(
            f"\n{generate_sample(run, params, key)}\n\n"
            f"Test loss at step {step}, the step with the best validation loss: {described}\n"
            f"Everything is in {run.directory}: {workdir.CHECKPOINTS}/, {workdir.METRICS}, "
            f"{workdir.SAMPLES}, {workdir.CURVES}, TensorBoard events\n"
            f"Generate text: {command}{cell_file.make_flag(run.config.model)}"
        )
    return Run(config, run.vocabulary, run.model, params, step, run.directory)
