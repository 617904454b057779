"""Train the trials of a sweep, which its workers share through a study of Optuna."""

import contextlib
import functools
import itertools
import math
import os
import random
import runpy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from lstm_jax import training
from lstm_jax.config import Config, complete_config, flatten
from lstm_jax.errors import (
    NotFiniteError,
    UnavailableError,
    UserError,
    make_visible,
    name_setting,
    note,
    one_line,
    run_user_code,
)
from lstm_jax.run import metrics, workdir
from lstm_jax.run.interrupts import Stopped

# From a trial to config fields, by dotted name.
Space = Callable[[BaseTrial], Mapping[str, object]]

# A worker writes a heartbeat into its trial at this interval, and is dead if it has not done so for
# `STALE_SECONDS`.
BEAT_SECONDS, STALE_SECONDS = 10, 90

EXPERIMENT = "experiment"  # Attribute of a study: the fields of the config that trials change.
# Attributes of a trial, which it keeps when it is run again.
OVERRIDES = "overrides"
TEST_LOSS = "test_loss"
REASON = "reason"  # Why it can't be trained.

# Queue a trial again, with its parameters and losses. If the storage has heartbeats, Optuna does so
# for a trial of a dead worker, whose death it may have caused.
with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    retry = Retry(max_retry=10, inherit_intermediate_values=True)
    retry_interrupted = Retry(max_retry=None, inherit_intermediate_values=True)

_CHOICES = str, int, float, bool, type(None)  # What a study stores as it is.


class Sweep(NamedTuple):
    """The sweep that a worker takes part in."""

    study: Study
    experiment: Config  # The config that trials change.
    space: Space
    directory: Path
    trials: int  # The total number to train, over all workers.


def load_space(path: str) -> Space:
    """Run a space file, and return its function; the mistakes of both are a `UserError`."""
    with run_user_code("space file", path):
        get_overrides = runpy.run_path(path)["get_overrides"]

    def get_fields(trial: BaseTrial) -> Mapping[str, object]:
        with run_user_code("space file", path, optuna.TrialPruned):
            fields = dict(get_overrides(trial))
        for name, choices in _get_choices(trial).items():
            if not all(isinstance(choice, _CHOICES) for choice in choices):
                raise UserError(f"space file {path}: the choices of {name} must be numbers or text")
        return {name: x.item() if isinstance(x, np.generic) else x for name, x in fields.items()}

    return get_fields


def make_seed_space(first: int, number: int) -> Space:
    """Return the space of consecutive seeds."""
    seeds = range(first, first + number)
    return lambda trial: {"seed": trial.suggest_categorical("seed", seeds)}


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
    sampler: BaseSampler = TPESampler(multivariate=True, constant_liar=True)
    if grid:
        choices = list_choices(space, experiment)
        points = math.prod(map(len, choices.values()))
        trials, sampler = min(trials or points, points), GridSampler(choices)
    # Hyperband (Li et al. 2018) runs successive halving over epochs in each bracket.
    pruner = HyperbandPruner(1, experiment.num_epochs) if prune else NopPruner()
    directory = workdir.expand_path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    location = location or f"sqlite:///{quote(str(directory))}/study.db"
    study = open_study(directory.name, location, sampler=sampler, pruner=pruner)
    for old in study.get_trials(deepcopy=False) if grid else ():
        is_of_grid = "grid_id" in old.system_attrs or not old.state.is_finished()
        if not is_of_grid or any(choices.get(name) != x for name, x in _get_choices(old).items()):
            raise UserError(f"{directory} holds another sweep: use another --workdir")
    fields = {name: repr(value) for name, value in flatten(experiment)}
    before = study.user_attrs.get(EXPERIMENT, fields)
    if changed := [name for name, value in before.items() if fields.get(name, value) != value]:
        raise UserError(
            f"{directory} holds a sweep with another {changed[0]}: use another --workdir"
        )
    study.set_user_attr(EXPERIMENT, fields)
    return Sweep(study, experiment, space, directory, trials or 40)


def open_study(name: str, location: str, **options: Any) -> Study:
    """Open or create a study in the database of a URL, or in a journal file."""
    attempts = 4
    while True:
        try:
            storage = _open_storage(location)
            return optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, **options
            )
        except Exception as error:
            attempts -= 1
            if not attempts:
                message = f"the study can't be opened ({one_line(error)[:300]}): see --study"
                raise UserError(message) from None
        time.sleep(random.random())  # Several workers may create the tables at the same time.


def _open_storage(location: str) -> BaseStorage:
    if "://" not in location:
        return JournalStorage(JournalFileBackend(os.path.expanduser(location)))
    # By default, SQLite waits 5 seconds for other workers.
    settings = {"timeout": 60} if location.startswith("sqlite") else {}
    return RDBStorage(
        location,
        engine_kwargs={"connect_args": settings},
        heartbeat_interval=BEAT_SECONDS,
        grace_period=STALE_SECONDS,
        heartbeat_stale_trial_callback=retry,
    )


def list_choices(space: Space, experiment: Config) -> dict[str, list[Any]]:
    """Return the choices of each parameter of a grid; raise `UserError` if one has none."""
    study = optuna.create_study()
    trial = study.ask()
    with contextlib.suppress(optuna.TrialPruned):
        complete_config(experiment, space(trial))
    choices = _get_choices(trial)
    if not all(choices.values()):
        raise UserError("a grid needs choices: use suggest_categorical for every parameter")
    for point in itertools.product(*choices.values()):
        study.enqueue_trial(dict(zip(choices, point, strict=True)))
        trial = study.ask()
        with contextlib.suppress(optuna.TrialPruned):
            space(trial)
        if {*trial.distributions} != {*choices}:
            raise UserError(
                "a parameter of a grid can't depend on others, or follow a TrialPruned: "
                "use --sampler tpe"
            )
    return choices


def _get_choices(trial: BaseTrial) -> dict[str, list[Any]]:
    """Return the choices of each parameter of a trial; an empty list for one without choices."""
    return {name: [*getattr(x, "choices", ())] for name, x in trial.distributions.items()}


def get_number(trial: FrozenTrial) -> int:
    """Return the number of a trial, which it keeps when it is run again."""
    first = Retry.retried_trial_number(trial)
    return trial.number if first is None else first


def get_directory(sweep: Path, trial: FrozenTrial) -> Path:
    """Return the working directory of a trial in that of a sweep."""
    return sweep / "trials" / f"{get_number(trial):04}"


def list_trials(study: Study) -> list[FrozenTrial]:
    """Return the last attempt at each trial: first the complete ones, by their losses."""
    last = {get_number(trial): trial for trial in study.get_trials(deepcopy=False)}

    def rank(trial: FrozenTrial) -> tuple[bool, float]:
        return trial.state != TrialState.COMPLETE, math.inf if trial.value is None else trial.value

    return sorted(last.values(), key=rank)


def drop_repeated(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the first trial at each point: two workers may train the last point of a grid."""
    first = dict[str, FrozenTrial]()
    for trial in trials:
        first.setdefault(str(trial.params), trial)
    return [*first.values()]


def run_worker(sweep: Sweep) -> None:
    """Train trials until all workers together have started `sweep.trials`.

    Raise `UnavailableError` if the study can't be written.
    """

    def end_trial(study: Study, trial: FrozenTrial) -> None:
        note(make_row(trial))
        jax.clear_caches()  # Each trial compiles its own functions.

    while True:
        fail_stale_trials(sweep.study)  # Queues them again.
        states = [trial.state for trial in list_trials(sweep.study)]
        if len(states) >= sweep.trials and TrialState.WAITING not in states:
            return
        run_trial = functools.partial(_run_trial, sweep)
        try:
            sweep.study.optimize(run_trial, n_trials=1, callbacks=[end_trial])
        except (StorageInternalError, AssertionError) as error:
            # While Optuna handles it, it asserts that the trial has ended.
            if StorageInternalError not in (type(error), type(error.__context__)):
                raise
            raise UnavailableError("can't write the study: free space, then run it again") from None


def _run_trial(sweep: Sweep, trial: Trial) -> float:
    """Train a trial and return its validation loss.

    Queue it again if it is interrupted, or a point of a grid has a mistake. Raise `TrialPruned` if
    its loss is not finite or memory runs out.
    """
    directory = get_directory(sweep.directory, sweep.study.trials[trial.number])
    try:
        overrides = sweep.space(trial)
        config = complete_config(sweep.experiment, overrides)
        trial.set_user_attr(OVERRIDES, dict(overrides))
        directory.mkdir(parents=True, exist_ok=True)
        with (
            (directory / "output.txt").open(
                "a", encoding="utf-8", errors="backslashreplace"
            ) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            training.train(config, directory, functools.partial(_report_loss, trial, config))
    except (NotFiniteError, jax.errors.JaxRuntimeError, MemoryError) as error:
        trial.set_user_attr(REASON, one_line(error)[:300])
        raise optuna.TrialPruned from None
    except (Stopped, UserError, OSError) as error:
        frozen = sweep.study.trials[trial.number]
        is_interrupted = isinstance(error, (Stopped, UnavailableError, OSError))
        # A grid needs all its points; a mistake in sampled settings would be repeated forever.
        if is_interrupted or "grid_id" in frozen.system_attrs:
            retry_interrupted(sweep.study, frozen)
        raise
    validation, test = read_losses(directory)
    trial.set_user_attr(TEST_LOSS, test)
    return validation


def read_losses(directory: Path) -> tuple[float, float]:
    """Return the validation loss of the best checkpoint of a run, and its test loss."""
    losses: dict[str, list[float]] = {"train": [], "validation": [], "test": []}
    for row in metrics.read_metrics(directory / workdir.METRICS):
        losses[row["split"]].append(row["loss"])
    return min(losses["validation"]), losses["test"][-1]


def _report_loss(trial: Trial, config: Config, row: metrics.Row) -> None:
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
    cells = [str(get_number(trial)), trial.state.name.lower()]
    cells += ["" if loss is None else f"{loss:.4f}" for loss in losses]
    overrides = trial.user_attrs.get(OVERRIDES, trial.params)
    settings = [
        f"{name.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in overrides.items()
    ]
    settings += [trial.user_attrs[REASON]] if REASON in trial.user_attrs else []
    return make_visible(f"| {' | '.join([*cells, ', '.join(settings)])} |")


def describe_results(study: Study, command: str) -> str:
    """Return the table of all trials, and the command that trains the best one."""
    trials = list_trials(study)
    lines = [
        "| trial | state | validation | test | settings |",
        "| ---: | --- | ---: | ---: | --- |",
    ]
    lines += map(make_row, trials)
    complete = drop_repeated(t for t in trials if t.state == TrialState.COMPLETE)
    if len(complete) > 1 and all(set(trial.params) == {"seed"} for trial in complete):
        losses = [(trial.values[0], trial.user_attrs[TEST_LOSS]) for trial in complete]
        means = [f"{mean(x):.4f} ± {stdev(x):.4f}" for x in zip(*losses, strict=True)]
        lines += ["", f"Mean of {len(complete)} seeds: validation {means[0]}, test {means[1]}"]
    elif complete:
        settings = [name_setting(*field) for field in complete[0].user_attrs[OVERRIDES].items()]
        lines += ["", f"Train the best one: {' '.join([command, *settings])}"]
    return "\n".join(lines)
