r"""Finds good settings for an experiment, or the spread of one over seeds.

    python -m lstm_jax.sweep --config experiments/quick.py \
        --space experiments/sweeps/quick.py --trials 40
    python -m lstm_jax.sweep --config experiments/quick.py --seeds 8

The same command again goes on where the sweep stopped, and any number of processes may run it at
once.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import contextlib
import math
import signal
from pathlib import Path

import jax
import optuna
from absl import flags
from ml_collections import config_flags

from lstm_jax import command, config
from lstm_jax.data import sources, texts
from lstm_jax.devices import parallel
from lstm_jax.errors import UserError
from lstm_jax.sweep import population, report, search, space, study
from lstm_jax.sweep.table import Table


class _TerminatedError(SystemExit):
    """SIGTERM came between two trials."""


def use_all_cores() -> None:
    """One device a core, so that no trial depends on which one was first in its process."""
    with contextlib.suppress(RuntimeError):  # JAX has started: it keeps what devices it has.
        jax.config.update("jax_num_cpu_devices", parallel.count_cores())


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
    experiment = config.complete_config(values.config)
    if values.seeds:
        searched, trials, sampler = (
            space.make_seed_space(experiment.seed, values.seeds),
            values.seeds,
            "grid",
        )
        members, what = (
            values.population or min(values.seeds, population.LARGEST),
            f"seeds{values.seeds}",
        )
    else:
        searched, trials, sampler = (
            space.load_space(Path(values.space)),
            values.trials,
            values.sampler,
        )
        members, what = values.population or 1, Path(values.space).stem
    pruner = values.pruner or ("none" if members > 1 or values.seeds else "hyperband")
    if members > 1 and pruner != "none":
        raise UserError("the members of a population are trained to their end: leave out --pruner")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    use_all_cores()
    drawn, parameters = searched.check(experiment)
    if members > 1:
        population.check_members(drawn)
    grid = searched.grid() if sampler == "grid" else None
    if grid is not None:
        trials = min(trials, math.prod(map(len, grid.values())))
    experiment.data.sha256 = texts.load_texts(experiment.data).sha256
    if experiment.data.path:  # So that best.py runs anywhere.
        experiment.data.path = sources.make_absolute(experiment.data.path)
    name = values.name or "_".join(filter(None, (path.stem, argument, what)))
    directory = Path(values.workdir or Path("runs", "sweeps", name))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name_of_own in (study.WORKERS, study.TRIALS):
            study.make_directory(directory / name_of_own)
    except OSError as error:
        raise UserError(f"can't write to {directory}: {error.strerror}") from None
    report.check_places(directory)
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
    sweep = search.Sweep(experiment, searched, directory, trials, members)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with (
            Table(record, trials) as table,
            study.Worker(record, directory, trials) as worker,
        ):
            exit_code = search.run_worker(sweep, worker, table)
        report.write_report(record, directory, experiment, searched)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"can't read or write {error.filename or directory} ({error.strerror or error}): once "
            "that is mended, the same command goes on"
        ) from None
    print(report.summarize_sweep(record, directory))
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
    command.run_command(_main)
