"""Prepare a sweep and train its trials."""

import contextlib
import dataclasses
import io
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
from optuna import Trial, TrialPruned
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.study import Study
from optuna.trial import TrialState

from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.config import Config
from lstm_jax.data import files, texts
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError, one_line
from lstm_jax.run import cell_file, checkpoints, interrupts, metrics, workdir
from lstm_jax.run.signals import Stopped, StopRequest
from lstm_jax.sweep import report
from lstm_jax.sweep import space as space_lib
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.storage import REASON, AllStartedError, convert_errors

# The output of training, in the working directory of a trial.
OUTPUT = "output.txt"

# A worker stops after this many failed trials in a row. A diverged trial is not a failed one.
_MAX_FAILURES = 3
_POLL_SECONDS = 2

# Fields in which the experiments of a study's workers may differ: losses can be compared.
_FREE_FIELDS = (
    *("data.path", "data.directory", "data.prepared", "data.memory_megabytes"),
    *("mesh.data", "mesh.model", "sample.length", "sample.temperature"),
    "checkpoint_every_seconds",
)


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    sampler: study_lib.SamplerSettings
    experiment: Config  # The config that trials change.
    space: space_lib.Space
    directory: Path
    trials: int  # The total number to finish, over all workers.


class _TrialError(Exception):
    """A trial can't be trained with its settings. The argument is the reason."""


class _SpaceError(_TrialError):
    """The space file fails for a trial, which also ends the worker."""


@convert_errors()
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

    `experiment` is a complete config; `experiment_name` is part of the default `name`. Raise
    `UserError` or `OSError`.
    """
    if space_file and not seeds:
        space, space_name = space_lib.load_space(Path(space_file)), Path(space_file).stem
        sampler = sampler or "tpe"
    elif seeds and not space_file:
        if trials or sampler or seed is not None:
            raise UserError(
                "--seeds trains with each seed once: remove --trials, --sampler and --seed"
            )
        space, space_name = space_lib.make_seed_space(experiment.seed, seeds), f"seeds{seeds}"
        trials, sampler = seeds, "grid"
    else:
        raise UserError("use either --space experiments/sweeps/quick.py or --seeds 8")
    draws = space.draw_trials(experiment)
    grid = space.make_grid(draws) if sampler == "grid" else {}
    if sampler == "grid":
        points = math.prod(map(len, grid.values()))
        trials = min(trials or points, points)
    experiment = dataclasses.replace(
        experiment,
        model=cell_file.resolve_cell(experiment.model),
        data=texts.load_texts(experiment.data).resolve(experiment.data),
    )
    settings = study_lib.SamplerSettings(sampler, seed or 0, grid)
    uses_hyperband = pruner == "hyperband" or (pruner is None and not seeds)
    name = name or f"{experiment_name}_{space_name}"
    path = workdir.check_path(directory or Path("runs", "sweeps", name))
    path.mkdir(parents=True, exist_ok=True)
    study = study_lib.open_study(
        *(path, location, name),
        # As in JSON.
        {
            field: list(value) if isinstance(value, tuple) else value
            for field, value in config_lib.flatten(experiment)
            if field not in _FREE_FIELDS
        },
        {parameter for draw in draws for parameter in draw.params},
        settings,
        # Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
        HyperbandPruner(1, experiment.num_epochs) if uses_hyperband else NopPruner(),
    )
    return Sweep(study, settings, experiment, space, path, trials or 40)


@convert_errors()
def run_sweep(sweep: Sweep) -> int:
    """Call `run_worker`, write the results and print a summary; return the exit code."""
    exit_code, signals, mistake = 0, StopRequest(), None
    try:
        # The loop of a single run has its own handler.
        with interrupts.handle_signals(signals.handle_signal):
            run_worker(sweep, signals)
    except Stopped as stopped:
        exit_code = stopped.code
    except UnavailableError:
        raise
    except UserError as error:  # After the trials that succeeded.
        mistake = error
    try:
        with interrupts.handle_signals(lambda *unused: None):
            print(report.write_report(sweep.study, sweep.directory, sweep.experiment))
    finally:
        if mistake:
            raise mistake
    return exit_code


def run_worker(sweep: Sweep, signals: StopRequest | None = None) -> None:
    """Train trials until all workers together have finished `sweep.trials`.

    A trial that a signal stops is queued again, so that the same command resumes it.
    """
    study, signals, failures = sweep.study, signals or StopRequest(), 0
    storage = study_lib.get_storage(study)
    storage.limit = sweep.trials
    while True:
        storage.queue_dead(study._study_id)
        signals.check()
        try:
            with warnings.catch_warnings(action="ignore"):  # Heartbeats are for `Study.optimize`.
                trial = study.ask()
        except AllStartedError:
            if all(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
                return
            with signals.at_once():
                time.sleep(_POLL_SECONDS)  # Other workers train the last trials.
            continue
        error = _run_trial(sweep, trial, signals)
        failures = failures + 1 if error else 0
        report.print_end(study, trial.number, sweep.trials)
        report.write_trials(study, sweep.directory)
        jax.clear_caches()  # Each trial compiles its own functions.
        if isinstance(error, _SpaceError):
            raise UserError(str(error))
        if failures >= _MAX_FAILURES:
            raise UserError(f"{failures} trials in a row failed, the last: {error}")


def _run_trial(sweep: Sweep, trial: Trial, signals: StopRequest) -> _TrialError | None:
    """Train a trial and record its result; return the error if it failed.

    If this process was suspended, and another worker has taken the trial over, record nothing.
    """
    study, storage = sweep.study, study_lib.get_storage(sweep.study)
    loss, error, reason = None, None, ""
    try:
        with get_heartbeat_thread(trial._trial_id, study._storage):
            loss = _train_trial(sweep, trial, signals)
        state = TrialState.COMPLETE
    except TrialPruned as pruned:
        state, reason = TrialState.PRUNED, str(pruned)
    except _TrialError as failed:
        state, error, reason = TrialState.FAIL, failed, str(failed)
    except BaseException as interruption:
        # An unexpected error ends the worker, so it counts as its death.
        is_known = isinstance(interruption, (Stopped, UserError, OSError, OptunaError))
        is_ours = storage.queue_again(trial, is_dead=not is_known)
        if is_ours or not isinstance(interruption, Exception):
            raise
        return None
    with contextlib.suppress(UpdateFinishedTrialError, ValueError):  # The latter: it is queued.
        storage.read_held(trial)
        if reason:
            trial.set_user_attr(REASON, reason)
        study.tell(trial, loss, state, skip_if_finished=True)
        return error
    return None


def _train_trial(sweep: Sweep, trial: Trial, signals: StopRequest) -> float:
    """Train a trial and return its validation loss; raise `TrialPruned` or `_TrialError`."""
    sweep.study.sampler = sweep.sampler.make_sampler(trial.number)
    try:
        # Draws the parameters of a new trial. A signal waits until all of them are drawn.
        overrides, config = sweep.space.draw_config(trial, sweep.experiment)
    except UserError as error:
        raise _SpaceError(str(error)) from None
    storage = study_lib.get_storage(sweep.study)
    storage.read_held(trial)
    trial.set_user_attr(study_lib.OVERRIDES, overrides)
    directory = study_lib.get_trial_directory(sweep.directory, trial)
    study_lib.claim_directory(directory, trial)

    def watch(row: metrics.Row) -> None:
        # Only after whole epochs, and once: a resumed trial measures its last one again.
        epoch, loss = int(row["epoch"]), row["loss"]
        if row["split"] != "validation" or not epoch or epoch != row["epoch"]:
            return
        reported = storage.read_held(trial).intermediate_values
        if math.isfinite(loss) and epoch not in reported:
            trial.report(loss, epoch)
        is_last = epoch == config.num_epochs or row["step"] == config.max_steps
        if not is_last and trial.should_prune():
            raise TrialPruned

    try:
        output = files.open_append(directory / OUTPUT)
        with (
            io.TextIOWrapper(output, "utf-8", "backslashreplace") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            signals.at_once(),
        ):
            exit_code = training.train(config, directory, watch)
    except NotFiniteError as error:
        raise TrialPruned(str(error)) from None
    except UnavailableError:
        raise  # A later attempt may succeed, so the trial is queued again.
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
