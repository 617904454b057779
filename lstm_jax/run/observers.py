"""Log, save, validate and stop a single run after its training steps."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from lstm_jax import batches, generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.controls import Controls
from lstm_jax.data import files
from lstm_jax.devices import hosts, parallel
from lstm_jax.errors import NotFiniteError, name_setting, warn
from lstm_jax.run import advice, figures, interrupts, messages, metrics, workdir
from lstm_jax.run.checkpoints import list_steps
from lstm_jax.run.loop import Loop, Observer
from lstm_jax.run.profiler import Profiler
from lstm_jax.run.progress import Progress
from lstm_jax.run.session import Session
from lstm_jax.run.signals import Pacer, Stopped, StopRequest

_SECONDS_OF_CURVES = 10  # Plotting takes a tenth of a second, while the devices wait.


@contextlib.contextmanager
def observe(run: Session) -> Iterator[list[Observer]]:
    """Open the observers of a run, in the order in which the loop calls them.

    A signal ends the block, with everything saved, and sets `run.loop.exit_code`.
    """
    loop, plan, stop = run.loop, run.plan, StopRequest()
    traced = run.directory if run.config.profile and hosts.is_first() else None
    with (
        contextlib.closing(Profiler(traced, loop.step)) as profiler,
        contextlib.closing(
            Progress(loop.step, loop.last_step, plan.steps_per_epoch, run.prints)
        ) as progress,
        interrupts.handle_signals(stop.handle_signal),
    ):
        save = Save(run)
        try:
            yield [
                Pacer(loop.step),  # First: it sets `loop.in_step`, which the others read.
                profiler,
                progress,
                Log(run, progress),
                save,  # Before the validation: a run that is stopped during it resumes from here.
                Validate(run, progress, stop),
                stop,
            ]
        except Stopped as stopped:
            save.save_once(loop)
            run.checkpoints.wait()
            if hosts.is_first():
                plot_curves(run)
            run.print(messages.describe_stop(run))
            loop.exit_code = stopped.code


class Log(Observer):
    """Records the mean training loss of the steps since the last record."""

    def __init__(self, run: Session, progress: Progress) -> None:
        self._run, self._progress = run, progress

    def after_step(self, loop: Loop) -> None:
        """Record a row every `log_every_steps`."""
        if loop.step % self._run.config.log_every_steps:
            return
        check_finite(self._run, loop)
        state, plan = loop.state, self._run.plan
        if number := int(state.loss_steps):
            loss = float(state.loss_sum) / number
            speed = self._progress.measure_speed(loop.step) * plan.tokens_per_step
            self._progress.update(loop.step, loss, speed)
            extra: metrics.Extra = {
                "learning_rate": plan.get_learning_rate(loop.step, int(state.skipped)),
                "gradient_norm": float(state.norm_sum) / number,
            }
            if speed:  # Otherwise it is unknown.
                extra["tokens_per_second"] = round(speed)
            self._run.record(loop.step, "train", loss, **extra)
        loop.state = state.clear("loss_sum", "norm_sum", "loss_steps")


class Save(Observer):
    """Saves a checkpoint before each validation, and every `checkpoint_every_seconds`."""

    def __init__(self, run: Session) -> None:
        self._run, self._step, self._clock = run, run.loop.step, time.monotonic()

    def after_step(self, loop: Loop) -> None:
        """Save if it is time to; raise `UnavailableError` if the last save has failed."""
        is_saving = self._run.checkpoints.check()
        has_waited = time.monotonic() - self._clock >= self._run.config.checkpoint_every_seconds
        # Each process has its own clock, so the processes have to agree.
        is_due = loop.in_step and hosts.max_over_processes(has_waited and not is_saving)
        if is_due or self._run.plan.validates_at(loop.step):
            self.save_once(loop)

    def save_once(self, loop: Loop) -> None:
        """Start saving, unless this step is saved; fail or warn if a step was skipped."""
        if loop.step != self._step:
            check_finite(self._run, loop)
            self._run.save(loop.step, loop.state)
            self._step, self._clock = loop.step, time.monotonic()


class Validate(Observer):
    """Measures the validation loss, generates a sample, and ends a run that is out of patience."""

    def __init__(self, run: Session, progress: Progress, stop: StopRequest) -> None:
        self._run, self._progress, self._stop = run, progress, stop
        number, ids = run.config.validation_tokens, run.ids["validation"]
        self._ids = ids[:number] if 0 < number < len(ids) else ids
        self._plotted = -math.inf  # When curves were plotted.

    def before_first_step(self, loop: Loop) -> None:
        """Validate a new run; and one that resumes, if its step is due or was validated.

        Resuming has removed the row of that validation.
        """
        if self._run.is_validated or self._run.plan.validates_at(loop.step):
            self._validate(loop)

    def after_step(self, loop: Loop) -> None:
        """Validate if it is due."""
        if self._run.plan.validates_at(loop.step):
            self._validate(loop)

    def _validate(self, loop: Loop) -> None:
        run, progress = self._run, self._progress
        with self._stop.at_once():  # Every process measures, so that none waits for another.
            wanted = loop.state.evaluated, loop.state.key
            params, key = parallel.gather_on_one_device(wanted, run.mesh)
            loss = loss_lib.compute_loss(run.model, params, self._ids)
            text = generate_sample(run, params, jax.random.fold_in(key, loop.step))
        # The row may end the run: this checkpoint must exist by then. Every process waits, so that
        # one whose write failed says so, while process 0 waits for it.
        run.checkpoints.wait()
        if hosts.is_first():
            step, losses = loop.step, {"validation": loss}
            run.record(step, "validation", loss, sample=text)
            workdir.append_sample(run.directory, step, run.config.sample.temperature, text)
            run.checkpoints.record_validation(step, loss)
            run.print(messages.describe_validation(run, loss, text))
            if step and (warning := advice.find_suspicion(losses, len(run.vocabulary))):
                run.print(f"warning: {warning}\n")
            # After the last step, `finish_run` plots them.
            if 0 < step < loop.last_step and time.monotonic() - self._plotted > _SECONDS_OF_CURVES:
                plot_curves(run)
                self._plotted = time.monotonic()
        progress.start_clock(loop.step)
        if loop.step < loop.last_step and run.ends_early():
            run.print(messages.describe_early_end(run))
            progress.finish(loop.step)
            loop.last_step = loop.step


def check_finite(run: Session, loop: Loop) -> None:
    """Save the batch of a step that was skipped because a number was not finite, and warn.

    Raise `NotFiniteError` if more steps were skipped so far than `config.max_skipped_steps`.
    """
    if not (step := int(loop.state.first_skipped)):
        return
    path, config, ids = run.directory / f"nonfinite_step_{step}.json", run.config, run.ids["train"]
    if hosts.is_first():
        place = batches.make_order(len(ids), config.batches, config.seed)[step - 1]
        batch = batches.cut_batch(ids, *place, config.batches.window_length)
        saved = {"step": step, "inputs": batch.inputs.tolist(), "targets": batch.targets.tolist()}
        files.write_file(path, f"{json.dumps(saved)}\n".encode())
    skipped, allowed = int(loop.state.skipped), config.max_skipped_steps
    message = (
        f"a parameter, the loss or a gradient of step {step} is not finite (its batch is in {path})"
    )
    if skipped > allowed:
        run.checkpoints.wait()
        last_saved = list_steps(run.directory / workdir.CHECKPOINTS)[-1]
        clips = config.optimizer.max_gradient_norm > 0
        clip = "" if clips else f"{name_setting('optimizer.max_gradient_norm', 1)}, "
        raise NotFiniteError(
            f"{message}: the last good checkpoint is that of step {last_saved}; resume from it "
            f"with a lower optimizer.learning_rate, {clip}or max_skipped_steps above {allowed}"
        )
    with tqdm.external_write_mode(sys.stderr):  # Not behind the bar.
        warn(f"{message}; skipped {skipped} of at most {allowed}")
    loop.state = loop.state.clear("first_skipped")


def generate_sample(run: Session, params: model_lib.Params, key: jax.Array) -> str:
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


def plot_curves(run: Session) -> None:
    """Plot the losses of metrics.jsonl."""
    figures.save_figure(figures.draw_metrics(run.read_metrics()), run.directory / workdir.CURVES)
