"""Prepare a sweep and train its trials."""

import contextlib
import dataclasses
import io
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import optuna
from optuna import Trial, TrialPruned
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import TrialState

from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.config import Config
from lstm_jax.data import files, texts
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError, one_line
from lstm_jax.run import cell_file, checkpoints, interrupts, metrics, workdir
from lstm_jax.sweep import progress, report
from lstm_jax.sweep import space as space_lib
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.storage import PLACE, SURPLUS, convert_errors

# The output of training, in the working directory of a trial.
OUTPUT = "output.txt"

# A worker stops after this many failed trials in a row. A diverged trial is not a failed one.
_MAX_FAILURES = 3
_POLL_SECONDS = 2


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    experiment: Config  # The config that trials change.
    space: space_lib.Space
    directory: Path
    trials: int  # The total number to finish, over all workers.


class Stopped(SystemExit):
    """A signal ended this worker. The argument is the exit code."""

    code: int


class _TrialError(Exception):
    """A trial can't be trained with its settings. The argument is the reason."""


@convert_errors()
def prepare_sweep(
    experiment: Config,
    experiment_name: str,
    *,
    space_file: str | None = None,
    seeds: int | None = None,
    trials: int = 40,
    directory: str | None = None,
    location: str | None = None,
    name: str | None = None,
    sampler: str = "tpe",
    pruner: str | None = None,
    seed: int = 0,
) -> Sweep:
    """Check the options of a sweep (see `python -m lstm_jax.sweep --help`), and open it.

    `experiment` is a complete config; `experiment_name` is part of the default `name`. Raise
    `UserError` or `OSError`.
    """
    if space_file and not seeds:
        space, space_name = space_lib.load_space(Path(space_file)), Path(space_file).stem
    elif seeds and not space_file:
        space, space_name = space_lib.make_seed_space(experiment.seed, seeds), f"seeds{seeds}"
        trials, sampler = seeds, "grid"
    else:
        raise UserError("use either --space experiments/sweeps/quick.py or --seeds 8")
    draws = space.draw(experiment)
    grid = None
    if sampler == "grid":
        grid = space.make_grid(draws)
        trials = min(trials, math.prod(map(len, grid.values())))
    experiment = dataclasses.replace(
        experiment,
        model=cell_file.resolve_cell(experiment.model),
        data=texts.load_texts(experiment.data).resolve(experiment.data),
    )
    name = name or f"{experiment_name}_{space_name}"
    path = Path(directory or Path("runs", "sweeps", name))
    path.mkdir(parents=True, exist_ok=True)
    study = study_lib.open_study(
        *(path, location, name),
        # As in JSON.
        {
            field: list(value) if isinstance(value, tuple) else value
            for field, value in config_lib.flatten(experiment)
            if field in config_lib.COMPARED
        },
        sorted({parameter for draw in draws for parameter in draw.params}),
        study_lib.SeededSampler(sampler, seed, grid),
        study_lib.make_pruner(pruner or ("none" if seeds else "hyperband"), experiment.num_epochs),
    )
    if grid is not None:
        study_lib.check_grid(study, grid)
    return Sweep(study, experiment, space, path, trials)


@convert_errors()
def run_sweep(sweep: Sweep) -> int:
    """Call `run_worker`, write the report and print a summary; return the exit code."""
    exit_code = 0
    try:
        # The loop of a single run has its own handler.
        with interrupts.handle_signals(_stop, *interrupts.SIGNALS):
            run_worker(sweep)
    except Stopped as stopped:
        exit_code = stopped.code
    with interrupts.handle_signals(lambda *unused: None, *interrupts.SIGNALS):
        print(report.write_report(sweep.study, sweep.directory, sweep.experiment, sweep.space))
    return exit_code


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(128 + number)


def run_worker(sweep: Sweep) -> None:
    """Train trials until all workers together have finished `sweep.trials`.

    A signal handler may raise `Stopped` at any time: the trial is then queued again, so that the
    same command resumes it.
    """
    failures: list[str] = []
    while True:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            optuna.storages.fail_stale_trials(sweep.study)
        trials = study_lib.list_trials(sweep.study)
        is_queued = any(trial.state == TrialState.WAITING for trial in trials)
        if len(trials) >= sweep.trials and not is_queued:
            if all(trial.state.is_finished() for trial in trials):
                return
            time.sleep(_POLL_SECONDS)  # Other workers train the last trials.
            continue
        number, reason = _run_trial(sweep)
        failures = [*failures, reason] if reason else []
        progress.print_end(sweep.study, number, sweep.trials)
        report.write_trials(sweep.study, sweep.directory)
        jax.clear_caches()  # Each trial compiles its own functions.
        if len(failures) >= _MAX_FAILURES:
            raise UserError(f"{len(failures)} trials in a row failed, the last: {failures[-1]}")


def _run_trial(sweep: Sweep) -> tuple[int, str]:
    """Train the next trial, queued or new; return its number, and the reason if it failed."""
    number, reason, is_lost = -1, "", False

    def objective(trial: Trial) -> float:
        nonlocal number, reason, is_lost
        number = trial.number
        try:
            return _train_trial(sweep, trial)
        except _TrialError as failed:
            reason = str(failed)
            raise
        except UpdateFinishedTrialError:
            is_lost = True
            raise

    try:
        sweep.study.optimize(objective, n_trials=1, catch=_TrialError)
    except BaseException:
        if is_lost:  # This process was suspended, and another worker resumes the trial.
            return number, ""
        if number >= 0:
            study_lib.give_back(sweep.study, number)
        raise
    return number, reason


def _train_trial(sweep: Sweep, trial: Trial) -> float:
    """Train a trial and return its validation loss; raise `TrialPruned` or `_TrialError`."""
    if trial.user_attrs[PLACE] >= sweep.trials:  # Another worker has just started the last one.
        trial.set_user_attr(SURPLUS, True)
        raise _TrialError
    overrides = sweep.space.overrides(trial)  # Draws the parameters of a new trial.
    config = sweep.space.apply(sweep.experiment, overrides)
    trial.set_user_attr(study_lib.OVERRIDES, overrides)
    frozen = trial.storage.get_trial(trial._trial_id)
    directory = study_lib.get_trial_directory(sweep.directory, frozen)
    directory.mkdir(exist_ok=True)

    def watch(row: metrics.Row) -> None:
        is_reported = row["epoch"] and _report(trial, row)
        if is_reported and row["epoch"] < config.num_epochs and trial.should_prune():
            raise TrialPruned

    try:
        with (
            _append(directory / OUTPUT) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            exit_code = training.train(config, directory, watch)
    except NotFiniteError as error:
        trial.set_user_attr(study_lib.REASON, f"diverged: {error}")
        raise TrialPruned from None
    except UnavailableError:
        raise  # A later attempt may succeed, so the trial is queued again.
    # Errors caused by the settings of a trial or by too little memory.
    except (UserError, jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error) if isinstance(error, UserError) else one_line(error)[:300]
        raise _fail(trial, reason) from None
    if exit_code:
        raise Stopped(exit_code)
    return _measure(trial, directory)


def _fail(trial: Trial, reason: str) -> _TrialError:
    """Record the reason why a trial fails; return the exception to raise."""
    trial.set_user_attr(study_lib.REASON, reason)
    return _TrialError(reason)


def _measure(trial: Trial, directory: Path) -> float:
    """Return the validation loss of the best checkpoint of a trial; record its test loss."""
    saved_in = directory / workdir.CHECKPOINTS
    best = checkpoints.find_best_step(saved_in)
    loss = checkpoints.read_validation_loss(saved_in, best) if best is not None else None
    if loss is None:
        raise _fail(trial, "no checkpoint has a validation loss")
    for row in metrics.read_metrics(directory / workdir.METRICS):
        if row["split"] == "test" and math.isfinite(row["loss"]):
            trial.set_user_attr(study_lib.TEST_LOSS, row["loss"])
    return loss


def _append(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(files.open_append(path), encoding="utf-8", errors="backslashreplace")


def _report(trial: Trial, row: metrics.Row) -> bool:
    """Report the validation loss after an epoch; return whether it is in this row.

    It is reported once, but a resumed trial measures its last one again.
    """
    epoch, loss = int(row["epoch"]), row["loss"]
    if row["split"] != "validation" or epoch != row["epoch"]:
        return False
    reported = trial.storage.get_trial(trial._trial_id).intermediate_values
    if math.isfinite(loss) and epoch not in reported:
        trial.report(loss, epoch)
    return True
