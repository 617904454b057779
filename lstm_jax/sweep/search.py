r"""Finds good settings for an experiment, or the spread of one over seeds.

    python -m lstm_jax.sweep --config experiments/quick.py \
        --space experiments/sweeps/quick.py --trials 40
    python -m lstm_jax.sweep --config experiments/quick.py --seeds 8

The same command again goes on where the sweep stopped, and any number of processes may run it at
once.
"""

import contextlib
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optuna
from ml_collections import ConfigDict
from optuna.trial import TrialState

from lstm_jax import train
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError, one_line
from lstm_jax.run import checkpoints, files, metrics, workdir
from lstm_jax.sweep import population, report, space, study
from lstm_jax.sweep.table import Table

# What training shows of a trial is kept in its working directory.
OUTPUT = "output.txt"

# So many trials that fail one after the other, none for numbers that explode, end the worker.
_MOST_FAILURES = 3
_SECONDS_BETWEEN_LOOKS = 2
# What is the fault of a trial's settings, or of this machine's memory; `_fail` tells what is not.
_FAILURES = (UserError, jax.errors.JaxRuntimeError, MemoryError)


class Sweep(NamedTuple):
    """What a worker reads and never changes."""

    experiment: ConfigDict
    space: space.Space
    directory: Path
    trials: int
    population: int


class _InterruptedError(Exception):
    """A signal ended the training of a trial.

    Attributes:
      exit_code: what the command is to exit with.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def run_worker(sweep: Sweep, worker: study.Worker, table: Table) -> int:
    """Works on trials until so many have finished as are wanted, by all workers together.

    Returns:
      The exit code: 0, or that of a signal after which the trial was given back.

    Raises:
      UserError: if trial after trial fails.
    """
    failures: list[str] = []
    while True:
        trials: list[optuna.Trial] = []
        while len(trials) < sweep.population and (trial := worker.next()):
            trials.append(trial)
        if not trials:
            if len(study.list_finished(worker.study)) >= sweep.trials:
                return 0
            time.sleep(_SECONDS_BETWEEN_LOOKS)  # Others are at work on the last ones.
            continue
        try:
            reasons = (
                _run_together(sweep, worker, trials)
                if sweep.population > 1
                else [_run(sweep, worker, trials[0])]
            )
        except _InterruptedError as stop:
            for trial in trials:
                worker.give_back(trial.number)
            return stop.exit_code
        for trial, reason in zip(trials, reasons, strict=True):
            failures = [*failures, reason] if reason else []
            table.tell(trial.number)
        report.write_trials(worker.study, sweep.directory)
        jax.clear_caches()  # Each trial compiled functions of its own.
        if len(failures) >= _MOST_FAILURES:
            raise UserError(f"{len(failures)} trials in a row failed, the last so: {failures[-1]}")


def _prepare(sweep: Sweep, worker: study.Worker, trial: optuna.Trial) -> ConfigDict:
    """The config of a trial, whose parameters are drawn if they were not yet."""
    try:
        overrides = sweep.space.overrides(trial)
        settings = sweep.space.apply(sweep.experiment, overrides)
    except UserError as error:
        _fail(worker, trial, error)
        raise
    trial.set_user_attr(study.OVERRIDES, overrides)
    return settings


def _run(sweep: Sweep, worker: study.Worker, trial: optuna.Trial) -> str:
    """Trains one trial and tells the study how it ended; returns why, if it failed."""
    settings = _prepare(sweep, worker, trial)
    directory = study.get_trial_directory(sweep.directory, _frozen(trial))
    study.claim_directory(directory, _frozen(trial))

    def report(row: Mapping[str, Any]) -> None:
        epoch = row["epoch"]
        if row["split"] == "validation" and epoch:
            _report(trial, epoch, row["loss"])
            if epoch < settings.num_epochs and trial.should_prune():
                raise optuna.TrialPruned

    try:
        with (
            _append(directory / OUTPUT) as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            exit_code = train.train(settings, directory, report)
    except optuna.TrialPruned:
        worker.tell(trial, TrialState.PRUNED)
    except optuna.exceptions.UpdateFinishedTrialError:
        worker.give_back(trial.number)  # Another worker goes on with it.
    except NotFiniteError as error:
        worker.tell(trial, TrialState.PRUNED, reason=f"diverged: {error}")
    except _FAILURES as error:
        return _fail(worker, trial, error)
    else:
        if exit_code:
            raise _InterruptedError(exit_code)
        _complete(worker, trial, directory)
    return ""


def _fail(worker: study.Worker, trial: optuna.Trial, error: Exception) -> str:
    """Ends a trial that can't be trained; returns why.

    Raises:
      UnavailableError: if that is the error; it is no fault of the trial's, which is given back.
    """
    if isinstance(error, UnavailableError):
        raise error
    reason = str(error) if isinstance(error, UserError) else one_line(error)[:300]
    worker.tell(trial, TrialState.FAIL, reason=reason)
    return reason


def _complete(worker: study.Worker, trial: optuna.Trial, directory: Path) -> None:
    """Ends a trial that was trained to its end, with the loss of its best checkpoint."""
    saved_in = directory / workdir.CHECKPOINTS
    best = checkpoints.find_best_step(saved_in)
    loss = checkpoints.read_validation_loss(saved_in, best) if best is not None else None
    if loss is None:
        worker.tell(trial, TrialState.FAIL, reason="no checkpoint has a validation loss")
        return
    for row in metrics.read_metrics(directory / workdir.METRICS):
        if row["split"] == "test" and math.isfinite(row["loss"]):
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr(study.TEST_LOSS, row["loss"])
    worker.tell(trial, TrialState.COMPLETE, loss)


def _run_together(
    sweep: Sweep, worker: study.Worker, trials: Sequence[optuna.Trial]
) -> Sequence[str]:
    """Trains the members of a population and tells the study how each ended."""
    settings = [_prepare(sweep, worker, trial) for trial in trials]
    directories = [study.get_trial_directory(sweep.directory, _frozen(trial)) for trial in trials]
    for trial, directory in zip(trials, directories, strict=True):
        study.claim_directory(directory, _frozen(trial))

    def report(member: int, epoch: int, loss: float) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            _report(trials[member], epoch, loss)

    output = sweep.directory / OUTPUT
    try:
        with _append(output) as file, contextlib.redirect_stdout(file):
            reasons = population.train_population(settings, directories, report)
    except _FAILURES as error:
        return [_fail(worker, trial, error) for trial in trials]
    for trial, directory, reason in zip(trials, directories, reasons, strict=True):
        if reason:
            worker.tell(trial, TrialState.PRUNED, reason=f"diverged: {reason}")
        else:
            _complete(worker, trial, directory)
    return [""] * len(trials)


def _append(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(files.open_append(path), encoding="utf-8", errors="backslashreplace")


def _report(trial: optuna.Trial, epoch: int, loss: float) -> None:
    """Notes a validation loss, once: a trial that goes on measures its last one again."""
    if math.isfinite(loss) and epoch not in _frozen(trial).intermediate_values:
        trial.report(loss, epoch)


def _frozen(trial: optuna.Trial) -> optuna.trial.FrozenTrial:
    return trial.storage.get_trial(trial._trial_id)
