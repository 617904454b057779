"""Prepare a sweep and train its trials."""

import contextlib
import dataclasses
import io
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
from optuna import Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import TrialState

from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.config import Config
from lstm_jax.data import files, texts
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError, one_line
from lstm_jax.run import cell_file, checkpoints, interrupts, metrics, workdir
from lstm_jax.sweep import options, population, report
from lstm_jax.sweep import space as space_lib
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.table import Table
from lstm_jax.sweep.worker import WORKERS, Worker, claim_directory, make_directory

# The output of training, in the working directory of a trial.
OUTPUT = "output.txt"

# A worker stops after this many failed trials in a row. A diverged trial is not a failed one.
_MAX_FAILURES = 3
_POLL_SECONDS = 2
# Errors caused by the settings of a trial or by too little memory; see also `_fail`.
_FAILURES = (UserError, jax.errors.JaxRuntimeError, MemoryError)


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    experiment: Config  # The config that trials change.
    space: space_lib.Space
    directory: Path
    trials: int  # The total number to finish, over all workers.
    population: int  # The number that a worker trains at once.


class Stopped(SystemExit):
    """A signal ended this worker. The argument is the exit code."""

    code: int


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
    members: int | None = None,
) -> Sweep:
    """Check the options of a sweep (see `python -m lstm_jax.sweep --help`), and open it.

    `experiment` is a complete config; `experiment_name` is part of the default `name`. Raise
    `UserError` or `OSError`.
    """
    if space_file and not seeds:
        space, space_name = space_lib.load_space(Path(space_file)), Path(space_file).stem
        members = members or 1
    elif seeds and not space_file:
        space, space_name = space_lib.make_seed_space(experiment.seed, seeds), f"seeds{seeds}"
        trials, sampler = seeds, "grid"
        members = members or min(seeds, options.LARGEST)
    else:
        raise UserError("use either --space experiments/sweeps/quick.py or --seeds 8")
    pruner = pruner or ("none" if members > 1 or seeds else "hyperband")
    if members > 1 and pruner != "none":
        raise UserError("a population can't be pruned: leave out --pruner or --population")
    configs, parameters = space.check(experiment)
    if members > 1:
        population.check_members(configs)
    grid = None
    if sampler == "grid":
        grid = space.grid()
        if missing := [name for name in parameters if name not in grid]:
            raise UserError(
                f"{space.name}: only some trials have the parameters {', '.join(missing)}, but a "
                "grid needs the same in all: draw them in every trial, or use another --sampler"
            )
        trials = min(trials, math.prod(map(len, grid.values())))
    experiment = dataclasses.replace(
        experiment,
        model=cell_file.resolve_cell(experiment.model),
        data=texts.load_texts(experiment.data).resolve(experiment.data),
    )
    name = name or f"{experiment_name}_{space_name}"
    path = Path(directory or Path("runs", "sweeps", name))
    path.mkdir(parents=True, exist_ok=True)
    for folder in (WORKERS, study_lib.TRIALS):
        make_directory(path / folder)
    report.check_paths(path)
    study = study_lib.open_study(
        *(path, location, name),
        # As in JSON.
        {
            field: list(value) if isinstance(value, tuple) else value
            for field, value in config_lib.flatten(experiment)
            if field in config_lib.COMPARED
        },
        parameters,
        study_lib.make_sampler(sampler, seed, grid),
        study_lib.make_pruner(pruner, experiment.num_epochs),
    )
    study_lib.check_space(study, space)
    if grid is not None:
        study_lib.check_grid(study, grid)
    return Sweep(study, experiment, space, path, trials, members)


def run_sweep(sweep: Sweep) -> int:
    """Call `run_worker`, write the report and print a summary; return the exit code."""
    exit_code = 0
    try:
        # The loop of a single run has its own handler.
        with interrupts.handle_signals(_stop, *interrupts.SIGNALS):
            run_worker(sweep)
    except Stopped as stopped:
        exit_code = stopped.code
    # For the seconds that the report takes.
    with interrupts.handle_signals(lambda *unused: None, *interrupts.SIGNALS):
        print(report.write_report(sweep.study, sweep.directory, sweep.experiment, sweep.space))
    return exit_code


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(128 + number)


def run_worker(sweep: Sweep) -> None:
    """Train trials until all workers together have finished `sweep.trials`.

    A signal handler may raise `Stopped` at any time: the trials are then released, so that the
    same command resumes them.
    """
    failures: list[str] = []
    with (
        Table(sweep.study, sweep.trials) as table,
        Worker(sweep.study, sweep.directory, sweep.trials) as worker,
    ):
        while True:
            trials = list(itertools.islice(iter(worker.next, None), sweep.population))
            if not trials:
                if len(study_lib.list_finished(sweep.study)) >= sweep.trials:
                    return
                time.sleep(_POLL_SECONDS)  # Other workers train the last trials.
                continue
            try:
                reasons = _train_trials(sweep, worker, trials)
            except UpdateFinishedTrialError:  # Another worker has taken one of them over.
                for trial in trials:
                    worker.close(trial.number, study_lib.GIVEN_BACK)
                reasons = [""] * len(trials)
            for trial, reason in zip(trials, reasons, strict=True):
                failures = [*failures, reason] if reason else []
                table.tell(trial.number)
            report.write_trials(sweep.study, sweep.directory)
            jax.clear_caches()  # Each trial compiles its own functions.
            if len(failures) >= _MAX_FAILURES:
                raise UserError(f"{len(failures)} trials in a row failed, the last: {failures[-1]}")


def _train_trials(sweep: Sweep, worker: Worker, trials: Sequence[Trial]) -> list[str]:
    """Train trials and record their results; return the reason of each failure, or ""."""
    configs, directories = [], []
    for trial in trials:
        try:
            overrides = sweep.space.overrides(trial)  # Draws the parameters of a new trial.
            configs.append(sweep.space.apply(sweep.experiment, overrides))
        except UserError as error:
            _fail(worker, trial, error)
            raise
        trial.set_user_attr(study_lib.OVERRIDES, overrides)
        directories.append(study_lib.get_trial_directory(sweep.directory, trial))
        claim_directory(directories[-1], trial)

    def watch(member: int, row: metrics.Row) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            _report(trials[member], row)

    is_alone = sweep.population == 1
    output = (directories[0] if is_alone else sweep.directory) / OUTPUT
    try:
        with (
            _append(output) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file if is_alone else sys.stderr),
        ):
            if is_alone:
                reasons = [_train_trial(trials[0], configs[0], directories[0])]
            else:
                reasons = population.train_population(configs, directories, watch)
    except TrialPruned:
        worker.tell(trials[0], TrialState.PRUNED)
        return [""]
    except _FAILURES as error:
        return [_fail(worker, trial, error) for trial in trials]
    for trial, directory, reason in zip(trials, directories, reasons, strict=True):
        if reason:
            worker.tell(trial, TrialState.PRUNED, reason=f"diverged: {reason}")
        else:
            _complete(worker, trial, directory)
    return [""] * len(trials)


def _train_trial(trial: Trial, config: Config, directory: Path) -> str:
    """Train one trial; if it diverged, return the reason, else ""."""

    def watch(row: metrics.Row) -> None:
        is_reported = row["epoch"] and _report(trial, row)
        if is_reported and row["epoch"] < config.num_epochs and trial.should_prune():
            raise TrialPruned

    try:
        exit_code = training.train(config, directory, watch)
    except NotFiniteError as error:
        return str(error)
    if exit_code:
        raise Stopped(exit_code)
    return ""


def _fail(worker: Worker, trial: Trial, error: Exception) -> str:
    """Record that a trial can't be trained; return the reason."""
    if isinstance(error, UnavailableError):
        raise error  # A later attempt may succeed, so the trial is released.
    reason = str(error) if isinstance(error, UserError) else one_line(error)[:300]
    worker.tell(trial, TrialState.FAIL, reason=reason)
    return reason


def _complete(worker: Worker, trial: Trial, directory: Path) -> None:
    """Record the validation loss of the best checkpoint of a trained trial."""
    saved_in = directory / workdir.CHECKPOINTS
    best = checkpoints.find_best_step(saved_in)
    loss = checkpoints.read_validation_loss(saved_in, best) if best is not None else None
    if loss is None:
        worker.tell(trial, TrialState.FAIL, reason="no checkpoint has a validation loss")
        return
    for row in metrics.read_metrics(directory / workdir.METRICS):
        if row["split"] == "test" and math.isfinite(row["loss"]):
            with contextlib.suppress(UpdateFinishedTrialError):
                trial.set_user_attr(study_lib.TEST_LOSS, row["loss"])
    worker.tell(trial, TrialState.COMPLETE, loss)


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
