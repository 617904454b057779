"""Prepare a sweep and train its trials."""

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Callable
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
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError, one_line
from lstm_jax.run import cell_file, checkpoints, interrupts, metrics, workdir
from lstm_jax.run.signals import Stopped, StopRequest
from lstm_jax.sweep import report
from lstm_jax.sweep import space as space_lib
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.study import use_optuna

# The output of training, in the working directory of a trial.
OUTPUT = "output.txt"

# A worker stops after this many failed trials in a row. A diverged trial is not a failed one.
_MAX_FAILURES = 3

# Fields in which the experiments of a study's workers may differ: losses can be compared.
_FREE_FIELDS = (
    *("data.path", "data.directory"),
    *("mesh.data", "mesh.model", "sample.length", "sample.temperature"),
    "checkpoint_every_seconds",
)


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    make_sampler: Callable[[int], BaseSampler]  # Of an attempt at a trial, by its number.
    experiment: Config  # The config that trials change.
    space: space_lib.Space
    directory: Path
    trials: int  # The total number to finish, over all workers.


class _TrialError(Exception):
    """A trial can't be trained with its settings. The argument is the reason."""


@use_optuna()
def prepare_sweep(
    experiment: Config,
    experiment_name: str,
    *,
    space_file: str | None = None,
    seeds: int | None = None,
    trials: int | None = None,
    directory: str | None = None,
    location: str | None = None,
    name: str | None = None,
    sampler: str | None = None,
    pruner: str | None = None,
    seed: int | None = None,
) -> Sweep:
    """Check the options of a sweep (see `python -m lstm_jax.sweep --help`), and open it.

    `experiment` is a complete config; `experiment_name` is part of the default `name`.
    """
    if space_file and not seeds:
        space, space_name = space_lib.load_space(Path(space_file)), Path(space_file).stem
    elif seeds and not space_file:
        if trials or sampler or seed is not None:
            raise UserError(
                "--seeds trains with each seed once: remove --trials, --sampler and --seed"
            )
        space, space_name = space_lib.make_seed_space(experiment.seed, seeds), f"seeds{seeds}"
        sampler, pruner = "grid", pruner or "none"
    else:
        raise UserError("use either --space experiments/sweeps/quick.py or --seeds 8")
    draws = space.draw_trials(experiment)
    grid = space_lib.make_grid(draws) if sampler == "grid" else {}
    if grid:
        points = math.prod(map(len, grid.values()))
        trials = min(trials or points, points)
    experiment = dataclasses.replace(
        experiment,
        model=cell_file.resolve_cell(experiment.model),
        data=texts.load_texts(experiment.data).resolve(experiment.data),
    )
    name = name or f"{experiment_name}_{space_name}"
    path = workdir.check_path(directory or Path("runs", "sweeps", name))
    path.mkdir(parents=True, exist_ok=True)
    shared = {
        field: list(value) if isinstance(value, tuple) else value  # As in JSON.
        for field, value in config_lib.flatten(experiment)
        if field not in _FREE_FIELDS
    }
    # Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
    stopper = NopPruner() if pruner == "none" else HyperbandPruner(1, experiment.num_epochs)
    study = study_lib.open_study(path, location, name, shared, stopper)
    make_sampler = functools.partial(study_lib.make_sampler, sampler or "tpe", seed or 0, grid)
    study.sampler = make_sampler(0)
    return Sweep(study, make_sampler, experiment, space, path, trials or 40)


@use_optuna()
def run_sweep(sweep: Sweep) -> int:
    """Call `run_worker`, write the results and print a summary; return the exit code."""
    exit_code, signals = 0, StopRequest()
    try:
        # The loop of a single run has its own handler.
        with interrupts.handle_signals(signals.handle_signal):
            run_worker(sweep, signals)
    except Stopped as stopped:
        exit_code = stopped.code
    finally:
        with interrupts.handle_signals(lambda *unused: None):
            print(report.write_report(sweep.study, sweep.directory, sweep.experiment))
    return exit_code


def run_worker(sweep: Sweep, signals: StopRequest | None = None) -> None:
    """Train trials until all workers together have started `sweep.trials`.

    A trial that is interrupted is queued again, so that the same command resumes it.
    """
    signals, failures = signals or StopRequest(), 0

    def end_trial(study: Study, trial: FrozenTrial) -> None:
        nonlocal failures
        failures = failures + 1 if trial.state == TrialState.FAIL else 0
        report.print_end(study, trial, sweep.trials)
        report.write_trials(study, sweep.directory)
        jax.clear_caches()  # Each trial compiles its own functions.
        if failures == _MAX_FAILURES:
            reason = trial.user_attrs[study_lib.REASON]
            raise UserError(f"{failures} trials in a row failed, the last: {reason}")

    while True:
        signals.check()
        fail_stale_trials(sweep.study)  # Queues them again.
        trials = study_lib.list_trials(sweep.study)
        if len(trials) >= sweep.trials and TrialState.WAITING not in {t.state for t in trials}:
            return
        sweep.study.optimize(
            lambda trial: _run_trial(sweep, trial, signals),
            n_trials=1,
            catch=_TrialError,
            callbacks=[end_trial],
        )


def _run_trial(sweep: Sweep, trial: Trial, signals: StopRequest) -> float:
    """Train a trial and return its validation loss; queue it again if it is interrupted.

    Raise `TrialPruned` or `_TrialError`, with the reason in the trial.
    """
    try:
        return _train_trial(sweep, trial, signals)
    except (NotFiniteError, _TrialError) as error:
        trial.set_user_attr(study_lib.REASON, str(error))
        raise TrialPruned if isinstance(error, NotFiniteError) else error from None
    except (Stopped, UnavailableError, OSError) as error:
        study_lib.make_retry()(sweep.study, sweep.study.trials[trial.number])
        if isinstance(error, Stopped):  # Otherwise Optuna does it.
            sweep.study.tell(trial, state=TrialState.FAIL)
        raise


def _train_trial(sweep: Sweep, trial: Trial, signals: StopRequest) -> float:
    sweep.study.sampler = sweep.make_sampler(trial.number)
    overrides, config = sweep.space.draw_config(trial, sweep.experiment)
    trial.set_user_attr(study_lib.OVERRIDES, overrides)
    attempt = sweep.study.trials[trial.number]
    directory = study_lib.get_directory(sweep.directory, attempt)
    directory.mkdir(parents=True, exist_ok=True)

    def watch(row: metrics.Row) -> None:
        # Only after whole epochs, and once: a resumed trial measures its last one again.
        epoch, loss = int(row["epoch"]), row["loss"]
        if row["split"] != "validation" or not epoch or epoch != row["epoch"]:
            return
        if math.isfinite(loss) and epoch not in attempt.intermediate_values:
            trial.report(loss, epoch)
        is_last = epoch == config.num_epochs or row["step"] == config.max_steps
        if not is_last and trial.should_prune():
            raise TrialPruned

    try:
        output = (directory / OUTPUT).open("ab")
        with (
            io.TextIOWrapper(output, "utf-8", "backslashreplace") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            signals.at_once(),
        ):
            exit_code = training.train(config, directory, watch)
    except (NotFiniteError, UnavailableError):
        raise
    # Errors caused by the settings of a trial or by too little memory.
    except (UserError, jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error) if isinstance(error, UserError) else one_line(error)[:300]
        raise _TrialError(reason) from None
    if exit_code:
        raise Stopped(exit_code)
    return _measure(trial, directory)


def _measure(trial: Trial, directory: Path) -> float:
    """Return the validation loss of the best checkpoint of a trial; record its test loss."""
    saved_in = directory / workdir.CHECKPOINTS
    best = checkpoints.find_best_step(saved_in)
    loss = checkpoints.read_validation_loss(saved_in, best) if best is not None else None
    if loss is None:
        raise _TrialError("no checkpoint has a validation loss")
    for row in metrics.read_metrics(directory / workdir.METRICS):
        if row["split"] == "test" and math.isfinite(row["loss"]):
            trial.set_user_attr(study_lib.TEST_LOSS, row["loss"])
    return loss
