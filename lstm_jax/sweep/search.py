"""Prepare a sweep and train its trials."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from optuna import Trial, TrialPruned
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.config import Config
from lstm_jax.data import texts
from lstm_jax.errors import UnavailableError, UserError, one_line
from lstm_jax.run import cell_file, interrupts, metrics, workdir
from lstm_jax.run.interrupts import Stopped, StopRequest
from lstm_jax.sweep import report
from lstm_jax.sweep import space as space_lib
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.study import use_optuna

# The output of training, in the working directory of a trial.
OUTPUT = "output.txt"

# Fields in which the experiments of a study's workers may differ: losses can be compared.
_FREE_FIELDS = (
    *("data.path", "data.directory", "mesh.data"),
    *("sample.length", "sample.temperature", "checkpoint_every_seconds"),
)


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    make_sampler: Callable[[int], BaseSampler]  # Of an attempt at a trial, by its number.
    experiment: Config  # The config that trials change.
    space: space_lib.Space
    directory: Path
    trials: int  # The total number to finish, over all workers.


@use_optuna()
def prepare_sweep(
    experiment: Config,
    name: str,
    space: space_lib.Space,
    *,
    trials: int | None,
    directory: str | None = None,
    location: str | None = None,
    grid: bool = False,
    prune: bool = True,
    seed: int = 0,
) -> Sweep:
    """Check the space of a sweep, and open its study (see `python -m lstm_jax.sweep --help`)."""
    choices = space.check(experiment)
    if grid:
        if not all(choices.values()):
            raise UserError("a grid needs choices: use suggest_categorical for every parameter")
        points = math.prod(map(len, choices.values()))
        trials = min(trials or points, points)
    experiment = dataclasses.replace(
        experiment,
        model=cell_file.resolve_cell(experiment.model),
        data=texts.load_texts(experiment.data).resolve(experiment.data),
    )
    path = workdir.expand_path(directory or Path("runs", "sweeps", name))
    path.mkdir(parents=True, exist_ok=True)
    shared = {
        field: list(value) if isinstance(value, tuple) else value  # As in JSON.
        for field, value in config_lib.flatten(experiment)
        if field not in _FREE_FIELDS
    }
    # Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
    pruner = HyperbandPruner(1, experiment.num_epochs) if prune else NopPruner()
    study = study_lib.open_study(path, location, name, shared, pruner)
    make_sampler = functools.partial(study_lib.make_sampler, seed, choices if grid else {})
    study.sampler = make_sampler(0)
    return Sweep(study, make_sampler, experiment, space, path, trials or 40)


@use_optuna()
def run_sweep(sweep: Sweep) -> None:
    """Call `run_worker`; write the results and print a summary, also if a signal stops it."""
    signals = StopRequest()
    try:
        # The loop of a single run has its own handler.
        with interrupts.handle_signals(signals.handle_signal):
            run_worker(sweep, signals)
    finally:
        with interrupts.handle_signals(lambda *unused: None):
            print(report.write_report(sweep.study, sweep.directory, sweep.experiment))


def run_worker(sweep: Sweep, signals: StopRequest) -> None:
    """Train trials until all workers together have started `sweep.trials`.

    A trial that is interrupted is queued again, so that the same command resumes it.
    """

    def end_trial(study: Study, trial: FrozenTrial) -> None:
        report.print_end(study, trial, sweep.trials)
        report.write_trials(study, sweep.directory)
        jax.clear_caches()  # Each trial compiles its own functions.

    while True:
        signals.check()
        fail_stale_trials(sweep.study)  # Queues them again.
        trials = study_lib.list_trials(sweep.study)
        if len(trials) >= sweep.trials and TrialState.WAITING not in {t.state for t in trials}:
            return
        sweep.study.optimize(
            lambda trial: _run_trial(sweep, trial, signals), n_trials=1, callbacks=[end_trial]
        )


def _run_trial(sweep: Sweep, trial: Trial, signals: StopRequest) -> float:
    """Train a trial and return its validation loss; queue it again if it is interrupted.

    Raise `TrialPruned` if it can't be trained with its settings, with the reason in the trial.
    """
    sweep.study.sampler = sweep.make_sampler(trial.number)
    overrides, config = sweep.space.draw_config(trial, sweep.experiment)
    trial.set_user_attr(study_lib.OVERRIDES, overrides)
    attempt = sweep.study.trials[trial.number]
    directory = study_lib.get_directory(sweep.directory, attempt)
    directory.mkdir(parents=True, exist_ok=True)
    watch = functools.partial(_report_loss, trial, attempt.intermediate_values, config)
    try:
        with (
            (directory / OUTPUT).open("a", encoding="utf-8", errors="backslashreplace") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            signals.at_once(),
        ):
            training.train(config, directory, watch)
    except (Stopped, UnavailableError, OSError):
        study_lib.retry(sweep.study, sweep.study.trials[trial.number])
        raise
    # Errors caused by the settings of a trial or by too little memory.
    except (UserError, jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error) if isinstance(error, UserError) else one_line(error)[:300]
        trial.set_user_attr(study_lib.REASON, reason)
        raise TrialPruned from None
    validation, test = read_losses(directory)
    trial.set_user_attr(study_lib.TEST_LOSS, test)
    return validation


def read_losses(directory: Path) -> tuple[float, float]:
    """Return the validation loss of the best checkpoint of a run, and its test loss."""
    losses: dict[str, list[float]] = {"train": [], "validation": [], "test": []}
    for row in metrics.read_metrics(directory / workdir.METRICS):
        losses[row["split"]].append(row["loss"])
    return min(losses["validation"]), losses["test"][-1]


def _report_loss(
    trial: Trial, known: Mapping[int, float], config: Config, row: metrics.Row
) -> None:
    """Report the loss after an epoch, but once: a resumed trial measures its last one again."""
    epoch, loss = int(row["epoch"]), row["loss"]
    if row["split"] != "validation" or not epoch or epoch != row["epoch"]:
        return
    if math.isfinite(loss) and epoch not in known:
        trial.report(loss, epoch)
    is_last = epoch == config.num_epochs or row["step"] == config.max_steps
    if not is_last and trial.should_prune():
        raise TrialPruned
