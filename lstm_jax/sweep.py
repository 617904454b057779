r"""Finds good settings for an experiment, or the spread of one over seeds.

    python -m lstm_jax.sweep --config experiments/quick.py \
        --space experiments/sweeps/quick.py --trials 40
    python -m lstm_jax.sweep --config experiments/quick.py --seeds 8

The same command again goes on where the sweep stopped, and any number of processes may run it at
once.
"""

if __name__ == "__main__":
    from lstm_jax import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import contextlib
import io
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optuna
from absl import flags
from ml_collections import ConfigDict, config_flags
from optuna.trial import TrialState

from lstm_jax import (
    checkpoints,
    command,
    config,
    corpus,
    files,
    metrics,
    parallel,
    population,
    space,
    study,
    sweep_report,
    sweep_table,
    texts,
    train,
    workdir,
)
from lstm_jax.errors import NotFiniteError, UnavailableError, UserError, one_line

# What training shows of a trial is kept in its working directory.
OUTPUT = "output.txt"

# So many trials that fail one after the other, none for numbers that explode, end the worker.
_MOST_FAILURES = 3
_SECONDS_BETWEEN_LOOKS = 2
# What is the fault of a trial's settings, or of this machine's memory; `_fail` tells what is not.
_FAILURES = (UserError, jax.errors.JaxRuntimeError, MemoryError)


class _TerminatedError(SystemExit):
    """SIGTERM came between two trials."""


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


def work(sweep: Sweep, worker: study.Worker, table: sweep_table.Table) -> int:
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
            if len(study.finished(worker.study)) >= sweep.trials:
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
        sweep_report.write_trials(worker.study, sweep.directory)
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
    directory = study.trial_directory(sweep.directory, _frozen(trial))
    study.claim(directory, _frozen(trial))

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
    best = checkpoints.best_step(saved_in)
    loss = checkpoints.validation_loss(saved_in, best) if best is not None else None
    if loss is None:
        worker.tell(trial, TrialState.FAIL, reason="no checkpoint has a validation loss")
        return
    for row in metrics.read(directory / workdir.METRICS):
        if row["split"] == "test" and math.isfinite(row["loss"]):
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr(study.TEST_LOSS, row["loss"])
    worker.tell(trial, TrialState.COMPLETE, loss)


def _run_together(
    sweep: Sweep, worker: study.Worker, trials: Sequence[optuna.Trial]
) -> Sequence[str]:
    """Trains the members of a population and tells the study how each ended."""
    settings = [_prepare(sweep, worker, trial) for trial in trials]
    directories = [study.trial_directory(sweep.directory, _frozen(trial)) for trial in trials]
    for trial, directory in zip(trials, directories, strict=True):
        study.claim(directory, _frozen(trial))

    def report(member: int, epoch: int, loss: float) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            _report(trials[member], epoch, loss)

    output = sweep.directory / OUTPUT
    try:
        with _append(output) as file, contextlib.redirect_stdout(file):
            reasons = population.train(settings, directories, report)
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


def use_all_cores() -> None:
    """One device a core, so that no trial depends on which one was first in its process."""
    with contextlib.suppress(RuntimeError):  # JAX has started: it keeps what devices it has.
        jax.config.update("jax_num_cpu_devices", parallel.cores())


def _main() -> int:
    values = flags.FLAGS
    config_flag = values["config"]
    if not config_flag.present:
        raise UserError("name an experiment: --config experiments/quick.py")
    file, _, argument = config_flag.config_filename.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no config file {path}")
    if (values.space is None) == (values.seeds is None):
        raise UserError(
            "say what to vary: --space experiments/sweeps/quick.py, or --seeds 8 (one of them)"
        )
    for name in ("trials", "seeds", "population"):
        if values[name].value is not None and values[name].value < 1:
            raise UserError(f"--{name} is {values[name].value}: it must be 1 or more")
    experiment = config.complete(values.config)
    if values.seeds:
        searched, trials, sampler = (
            space.of_seeds(experiment.seed, values.seeds),
            values.seeds,
            "grid",
        )
        members, what = (
            values.population or min(values.seeds, population.LARGEST),
            f"seeds{values.seeds}",
        )
    else:
        searched, trials, sampler = space.load(Path(values.space)), values.trials, values.sampler
        members, what = values.population or 1, Path(values.space).stem
    pruner = values.pruner or ("none" if members > 1 or values.seeds else "hyperband")
    if members > 1 and pruner != "none":
        raise UserError("the members of a population are trained to their end: leave out --pruner")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    use_all_cores()
    drawn, parameters = searched.check(experiment)
    if members > 1:
        population.check(drawn)
    grid = searched.grid() if sampler == "grid" else None
    if grid is not None:
        trials = min(trials, math.prod(map(len, grid.values())))
    experiment.data.sha256 = texts.read(experiment.data).sha256
    if experiment.data.path:  # So that best.py runs anywhere.
        experiment.data.path = corpus.absolute(experiment.data.path)
    name = values.name or "_".join(filter(None, (path.stem, argument, what)))
    directory = Path(values.workdir or Path("runs", "sweeps", name))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name_of_own in (study.WORKERS, study.TRIALS):
            study.make_directory(directory / name_of_own)
    except OSError as error:
        raise UserError(f"can't write to {directory}: {error.strerror}") from None
    sweep_report.check_places(directory)
    record = study.open_study(
        directory,
        values.study,
        name,
        experiment,
        parameters,
        study.SeededSampler(sampler, values.seed, grid),
        study.make_pruner(pruner, experiment.num_epochs),
    )
    study.check_space(record, searched)
    sweep = Sweep(experiment, searched, directory, trials, members)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with (
            sweep_table.Table(record, trials) as table,
            study.Worker(record, directory, trials) as worker,
        ):
            exit_code = work(sweep, worker, table)
        sweep_report.write(record, directory, experiment, searched)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"can't read or write {error.filename or directory} ({error.strerror or error}): once "
            "that is mended, the same command goes on"
        ) from None
    print(sweep_report.summary(record, directory))
    return exit_code


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM between two trials: the same as within one."""
    raise _TerminatedError(128 + number)


def _define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Experiment to start from: a Python file with get_config()."
    )
    flags.DEFINE_string(
        "space",
        None,
        f"What to vary: a Python file with {space.FUNCTION}(trial), which returns fields by name.",
    )
    flags.DEFINE_integer(
        "seeds", None, "Instead of --space: the same experiment with so many seeds."
    )
    flags.DEFINE_integer("trials", 40, "Trials to finish, by all workers together.")
    flags.DEFINE_string("workdir", None, "Where all is kept. [default: runs/sweeps/<name>]")
    flags.DEFINE_string(
        "study",
        None,
        "What the workers share: postgresql://..., mysql://..., sqlite:///FILE or journal:FILE. "
        f"[default: {study.DATABASE} in the working directory]",
    )
    flags.DEFINE_string("name", None, "Of the study. [default: <config>_<space>]")
    flags.DEFINE_enum("sampler", "tpe", study.SAMPLERS, "How settings are chosen.")
    flags.DEFINE_enum(
        "pruner",
        None,
        study.PRUNERS,
        "How trials end early. [default: hyperband; none for seeds and populations]",
    )
    flags.DEFINE_integer("seed", 0, "What the choice of settings follows from.")
    flags.DEFINE_integer(
        "population",
        None,
        "Trains so many trials at once in one program, where they differ only in "
        f"{', '.join(population.TRACEABLE)}. [default: 1; for --seeds all of them, at most "
        f"{population.LARGEST}]",
    )


if __name__ == "__main__":
    _define_flags()
    command.run(_main)
