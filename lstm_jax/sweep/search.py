"""Train the trials of a sweep, which its workers share through a study of Optuna."""

import contextlib
import functools
import math
import os
import random
import runpy
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import BruteForceSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lstm_jax import training
from lstm_jax.config import Config, complete_config, flatten
from lstm_jax.errors import (
    NotFiniteError,
    UnavailableError,
    UserError,
    make_visible,
    note,
    one_line,
    run_user_code,
)
from lstm_jax.run import workdir
from lstm_jax.run.interrupts import Stopped

# From a trial to config fields, by dotted name.
Space = Callable[[Trial], Mapping[str, object]]
Points = list[dict[str, Any]]  # The parameters of each point of a grid.

# A worker writes a heartbeat into its trial at this interval, and is dead if it has not done so for
# `STALE_SECONDS`.
BEAT_SECONDS, STALE_SECONDS = 10, 90

MOST_POINTS = 1000  # Listing the points takes longer than linear time: six seconds for these.
EXPERIMENT = "experiment"  # Attribute of a study: its grid, and the config that trials change.
# Attributes of a trial, which it keeps when it is run again.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"
REASON = "reason"  # Why it can't be trained.


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    experiment: Config  # The config that trials change.
    space: Space
    directory: Path
    trials: int  # The total number to train, over all workers.
    points: Points | None  # Of a grid: one for each trial.


def load_space(path: str) -> Space:
    """Run a space file, and return its function; the mistakes of both are a `UserError`."""
    with run_user_code("space file", path):
        get_overrides = runpy.run_path(path)["get_overrides"]

    def get_fields(trial: Trial) -> Mapping[str, object]:
        with run_user_code("space file", path, optuna.TrialPruned):
            fields = dict(get_overrides(trial))
        return {name: x.item() if isinstance(x, np.generic) else x for name, x in fields.items()}

    return get_fields


def make_seed_space(first: int, number: int) -> Space:
    """Return the space of consecutive seeds."""
    return lambda trial: {"seed": trial.suggest_int("seed", first, first + number - 1)}


def open_sweep(
    experiment: Config,
    space: Space,
    directory: Path | str,
    *,
    location: str | None = None,
    trials: int | None = None,
    grid: bool = False,
    prune: bool = False,
) -> Sweep:
    """Open or create a sweep in a directory; see `python -m lstm_jax.sweep --help`."""
    # Heartbeats, what they need, and two samplers are experimental.
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    points = list_points(space, experiment) if grid else None
    # Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
    pruner = HyperbandPruner(1, experiment.num_epochs) if prune else NopPruner()
    sampler = TPESampler(multivariate=True, constant_liar=True)
    directory = workdir.expand_path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    location = location or f"sqlite:///{quote(str(directory))}/study.db"
    study = open_study(directory.name, location, sampler=sampler, pruner=pruner)
    fields = {"grid": points} | dict(flatten(experiment))
    fields = {name: repr(value) for name, value in fields.items()}
    previous = {"grid": "None"} | study.user_attrs.get(EXPERIMENT, fields)
    if changed := [name for name, value in previous.items() if fields.get(name, value) != value]:
        raise UserError(
            f"{directory} holds a sweep with another {changed[0]}: use another --workdir"
        )
    study.set_user_attr(EXPERIMENT, fields)
    trials = trials or 40 if points is None else min(trials or len(points), len(points))
    return Sweep(study, experiment, space, directory, trials, points)


def open_study(name: str, location: str, **options: Any) -> Study:
    """Open or create a study in the database of a URL, or in a journal file."""
    # By default, SQLite waits 5 seconds for other workers.
    settings = {"timeout": 60} if location.startswith("sqlite") else {}
    for _ in range(4):
        try:
            storage = (
                RDBStorage(
                    location,
                    engine_kwargs={"connect_args": settings},
                    heartbeat_interval=BEAT_SECONDS,
                    grace_period=STALE_SECONDS,
                    # At most ten times: a trial may cause the death of its workers.
                    heartbeat_stale_trial_callback=Retry(10, inherit_intermediate_values=True),
                )
                if "://" in location
                else JournalStorage(JournalFileBackend(os.path.expanduser(location)))
            )
            return optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, **options
            )
        except Exception as error:
            message = one_line(error)[:300]
        time.sleep(random.random())  # Several workers may create the tables at the same time.
    raise UserError(f"the study can't be opened ({message}): see --study")


def list_points(space: Space, experiment: Config) -> Points:
    """Return all points of a grid, in the same order in each worker; check their configs."""
    study = optuna.create_study(sampler=BruteForceSampler(seed=0))
    study.optimize(lambda trial: bool(complete_config(experiment, space(trial))), MOST_POINTS + 1)
    if len(study.trials) > MOST_POINTS:
        raise UserError(f"a grid has at most {MOST_POINTS:,} points: use --sampler tpe")
    return [trial.params for trial in study.get_trials(states=[TrialState.COMPLETE])]


def get_number(trial: FrozenTrial) -> int:
    """Return the number of a trial, which it keeps when it is run again."""
    first = Retry.retried_trial_number(trial)
    return trial.number if first is None else first


def get_directory(sweep: Path, number: int) -> Path:
    """Return the working directory of a trial in that of a sweep."""
    return sweep / "trials" / f"{number:04}"


def list_trials(study: Study) -> list[FrozenTrial]:
    """Return the last attempt at each trial: first the complete ones, by their losses."""
    last = {get_number(trial): trial for trial in study.get_trials(deepcopy=False)}
    by_loss = sorted(last.values(), key=lambda x: math.inf if x.value is None else x.value)
    return sorted(by_loss, key=lambda trial: trial.state != TrialState.COMPLETE)


def run_worker(sweep: Sweep) -> int:
    """Train trials until all workers together have started `sweep.trials`.

    Return the number of trials that are unfinished: their workers still train them, or are dead.
    """

    def end_trial(study: Study, trial: FrozenTrial) -> None:
        note(make_row(trial))
        jax.clear_caches()  # Each trial compiles its own functions.

    while True:
        fail_stale_trials(sweep.study)  # Queues them again.
        states = [trial.state for trial in list_trials(sweep.study)]
        if len(states) >= sweep.trials and TrialState.WAITING not in states:
            return states.count(TrialState.RUNNING)
        sweep.study.optimize(functools.partial(_run_trial, sweep), 1, callbacks=[end_trial])


def _run_trial(sweep: Sweep, trial: Trial) -> float:
    """Train a trial and return its validation loss.

    Queue it again if it is interrupted, or a point of a grid has a mistake. Raise `TrialPruned` if
    its loss is not finite or memory runs out.
    """
    number = get_number(sweep.study.trials[trial.number])
    if sweep.points is not None:
        index = sorted(map(get_number, list_trials(sweep.study))).index(number)
        if index >= len(sweep.points):
            trial.set_user_attr(REASON, "other workers have started all points of the grid")
            raise optuna.TrialPruned
        sweep.study.sampler = PartialFixedSampler(sweep.points[index], RandomSampler())
    directory = get_directory(sweep.directory, number)
    try:
        overrides = sweep.space(trial)
        config = complete_config(sweep.experiment, overrides)
        trial.set_user_attr(OVERRIDES, dict(overrides))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "output.txt"
        with (
            path.open("a", encoding="utf-8", errors="backslashreplace") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            training.train(config, directory, functools.partial(_report_loss, trial, config))
    except (NotFiniteError, jax.errors.JaxRuntimeError, MemoryError) as error:
        trial.set_user_attr(REASON, one_line(error)[:300])
        raise optuna.TrialPruned from None
    except (Stopped, UserError, OSError) as error:
        is_interrupted = isinstance(error, (Stopped, UnavailableError, OSError))
        # A grid needs all its points; a mistake in sampled settings would be repeated forever.
        if is_interrupted or sweep.points is not None:
            retry = Retry(inherit_intermediate_values=True)
            retry(sweep.study, sweep.study.trials[trial.number])
        raise
    (test,) = training.read_losses(directory, "test").values()
    trial.set_user_attr(TEST_LOSS, test)
    return min(training.read_losses(directory, "validation").values())


def _report_loss(trial: Trial, config: Config, row: workdir.Row) -> None:
    """Report the validation loss after an epoch, and stop a trial that the pruner rejects."""
    epoch = int(row["epoch"])
    if row["split"] != "validation" or not epoch or epoch != row["epoch"]:
        return
    trial.report(row["loss"], epoch)
    is_last = epoch == config.num_epochs or row["step"] == config.max_steps
    if not is_last and trial.should_prune():
        raise optuna.TrialPruned


def make_row(trial: FrozenTrial) -> str:
    """Return the row of a trial in the table of results."""
    losses = trial.value, trial.user_attrs.get(TEST_LOSS)
    cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
    overrides = trial.user_attrs.get(OVERRIDES, trial.params)
    settings = [
        f"{name.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in overrides.items()
    ]
    settings += filter(None, [trial.user_attrs.get(REASON)])
    cells = [str(get_number(trial)), trial.state.name.lower(), *cells, ", ".join(settings)]
    return make_visible(f"| {' | '.join(cells)} |")


def describe_results(study: Study, command: str) -> str:
    """Return the table of all trials, and the command that trains the best one."""
    trials = list_trials(study)
    lines = ["| trial | state | validation | test | settings |", "|--:|---|--:|--:|---|"]
    lines += map(make_row, trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if running := sum(trial.state == TrialState.RUNNING for trial in trials):
        unfinished = f"Unfinished trials of other workers: {running}."
        resume = f"If these have ended, the same command resumes them after {STALE_SECONDS} seconds"
        lines += ["", f"{unfinished} {resume}"]
    if len(complete) > 1 and all(set(trial.params) == {"seed"} for trial in complete):
        losses = [(trial.values[0], trial.user_attrs[TEST_LOSS]) for trial in complete]
        means = [f"{mean(x):.4f} ± {stdev(x):.4f}" for x in zip(*losses, strict=True)]
        lines += ["", f"Mean of {len(complete)} seeds: validation {means[0]}, test {means[1]}"]
    elif complete:
        overrides = complete[0].user_attrs[OVERRIDES].items()
        settings = shlex.join(f"--config.{name}={value}" for name, value in overrides)
        best = "best one so far" if running else "best one"
        lines += ["", f"Train the {best}: {command} {settings}"]
    return "\n".join(lines)
