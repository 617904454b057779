"""Train a model, from its text to the test loss: open the run, take steps, finish."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax.config import Config
from lstm_jax.devices import parallel
from lstm_jax.run import messages, metrics, session, workdir
from lstm_jax.run.finish import finish_run
from lstm_jax.run.loop import Loop, Observer
from lstm_jax.run.observers import observe
from lstm_jax.run.plan import Plan
from lstm_jax.train_step import TrainStep, make_train_step


def train(
    config: Config | ConfigDict,
    directory: Path | str,
    watch: metrics.Watch = lambda row: None,
    quiet: bool = False,
) -> int:
    """Train the model that `config` describes, or resume the run in `directory`.

    Args:
      config: a config, which is completed and checked (`config.complete_config`).
      directory: the working directory, which all processes share.
      watch: called with each recorded loss, as a row of metrics.jsonl, for
        example to plot it in a notebook; rows of validations also have the generated text, as
        `sample`. If it raises an exception, the run ends, and can be resumed.
      quiet: whether to print nothing but warnings.

    Returns:
      The exit code: 0, or 130 after Ctrl-C (143 after SIGTERM) with everything saved.

    Raises:
      UserError: if the config is invalid; the text can't be read or is too short; the working
        directory holds another run or a damaged one, is in use, or can't be written; or the
        loss, a gradient or a parameter is not finite.
    """
    complete, directory = config_lib.complete_config(config), workdir.check_path(directory)
    parallel.use_cores(complete)
    with (
        jax.enable_x64(False),  # The caller may have enabled it, and set a mesh.
        jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())),
        session.open_run(complete, directory, watch, quiet) as run,
    ):
        messages.print_setup(run)
        if not run.is_finished:
            _train(run)
        if not run.loop.exit_code:
            finish_run(run)
        return run.loop.exit_code


def _train(run: session.Session) -> None:
    """Train a run to the last step, or until a signal or `patience` ends it."""
    train_step = make_train_step(run.model, run.optimizer, run.config, run.mesh)
    feed = run.make_feed()
    with observe(run) as observers:
        take_steps(run.loop, train_step, feed.next, run.plan, observers)


def take_steps(
    loop: Loop,
    train_step: TrainStep,
    next_batch: Callable[[int], Any],
    plan: Plan,
    observers: Sequence[Observer],
) -> None:
    """Take training steps until the last; call the observers, in their order, after each call.

    `next_batch(n)` returns the batches of the next n steps, on the devices.
    """
    for observer in observers:
        observer.before_first_step(loop)
    while loop.step < loop.last_step:
        steps = plan.count_steps_of_call(loop.step)
        batch = next_batch(steps)
        traced = jax.profiler.StepTraceAnnotation("train", step_num=loop.step + 1)
        # The step must not transfer anything else to the devices.
        with jax.transfer_guard("disallow"), traced:
            loop.state = train_step(loop.state, batch)
        loop.step += steps
        for observer in observers:
            observer.after_step(loop)
