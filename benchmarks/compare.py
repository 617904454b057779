"""Tune and train every variant of an experiment in the same way; write a table.

    python benchmarks/compare.py --out runs/cells
    python benchmarks/compare.py --out runs/cells --variants lstm,mingru --sampler grid \
        --space experiments/sweeps/learning_rate.py --trials 5 --tune_epochs 1
    python benchmarks/compare.py --out runs/optimizers --experiment experiments/optimizers.py \
        --space experiments/sweeps/optimizers.py --budgets seconds

It needs `pip install -e '.[sweep]'`. The variants of an experiment, experiments/cells.py by
default, are the names in its VARIANTS. The same command resumes an interrupted comparison, and
several processes may run it at the same time. For each variant it

1. tunes with `lstm_jax.sweep` on the validation split: the same space and the same number of trials
   for all;
2. trains the best settings with several seeds, each for --epochs;
3. trains them again, each for the number of steps that take --seconds, at the speed of the fastest
   trial of step 1; start, compilation and validation are not counted;
4. measures each trained model: the loss of the test split with the carry kept, and by windows of
   256 from a zero carry; characters a second in training, and in generation of one text.

OUT/compare.md has the results, OUT/tune/VARIANT/study.db all trials of a variant.
--config.FIELD=VALUE flags are passed to every training, for example for a small test.
"""

import argparse
import contextlib
import runpy
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optuna
from optuna.trial import FrozenTrial

import frame
import lstm_jax
from frame import ROOT, count_steps, measure_speed, print_head, print_row, spread, time_call
from lstm_jax import cells, generation
from lstm_jax.devices import setup
from lstm_jax.run import workdir
from lstm_jax.sweep import search

EXPERIMENTS = ROOT / "experiments"
WINDOW = 256  # Tokens.
GENERATED = 1000  # Tokens.


class Measured(NamedTuple):
    """Measurements of one trained model."""

    validation: float  # Nats per character with the carry kept, like `test`.
    test: float
    windows: float  # The test loss by windows, each from a zero carry.
    steps: float
    seconds: float  # Of training, evaluations included.
    training_speed: float  # Characters a second.
    generation_speed: float
    parameters: int


Results = dict[str, dict[str, list[Measured]]]  # By budget and variant: a run for each seed.


def main() -> None:
    """Do the remaining work, and write the results."""
    options = frame.parse_flags(
        __doc__,
        fields=True,
        out=Path("runs/cells"),
        experiment=EXPERIMENTS / "cells.py",
        variants="all",
        space=EXPERIMENTS / "sweeps" / "cells.py",
        sampler="tpe",
        trials=20,
        tune_epochs=6,
        epochs=6,
        seconds=180.0,
        budgets="steps,seconds",
        seeds=3,
    )
    names = options.variants.split(",")
    if options.variants == "all":
        names = list(runpy.run_path(str(options.experiment))["VARIANTS"])
    setup.keep_freed_memory()
    for name in names:
        tune(name, options)
    budgets = options.budgets.split(",")
    results = {budget: {name: train(name, budget, options) for name in names} for budget in budgets}
    table = options.out / "compare.md"
    with table.open("w") as file, contextlib.redirect_stdout(file):
        print_tables(results, options)
    print(table.read_text())


def tune(name: str, options: argparse.Namespace) -> None:
    """Tune a variant, or resume, until its trials are done."""
    search = ("--space", options.space, "--sampler", options.sampler, "--trials", options.trials)
    length = ("--pruner", "none", *options.fields, f"--config.num_epochs={options.tune_epochs}")
    run_sweep(options.out / "tune" / name, f"{options.experiment}:{name}", *search, *length)


def train(name: str, budget: str, options: argparse.Namespace) -> list[Measured]:
    """Train the best settings of a variant with several seeds, and measure them."""
    out, tuned = options.out / budget / name, options.out / "tune" / name
    best = load_trials(tuned)[0].user_attrs[search.OVERRIDES]
    fields = [*options.fields, *(f"--config.{name}={value}" for name, value in best.items())]
    fields.append(f"--config.num_epochs={options.epochs}")
    if budget == "seconds":
        tried = (path.parent for path in tuned.glob(f"trials/*/{workdir.METRICS}"))
        steps = count_steps(tried, options.seconds)
        fields[-1:] = ["--config.num_epochs=1000", f"--config.max_steps={steps}"]
    run_sweep(out, f"{options.experiment}:{name}", "--seeds", options.seeds, *fields)
    return [measure_once(trial, out) for trial in load_trials(out)]


def run_sweep(directory: Path, config: str, *flags: object) -> None:
    """Run a sweep until its last trial has ended, which another process may be training."""
    command = ("-m", "lstm_jax.sweep", "--config", config, "--workdir", directory, *flags)
    frame.run_python(*command)
    while not all(trial.state.is_finished() for trial in load_trials(directory)):
        time.sleep(5)
        frame.run_python(*command)


def load_trials(sweep: Path) -> list[FrozenTrial]:
    """Return the trials of a sweep, the best one first."""
    study = optuna.load_study(study_name=sweep.name, storage=f"sqlite:///{sweep}/study.db")
    return search.list_trials(study)


def measure_once(trial: FrozenTrial, sweep: Path) -> Measured:
    """Measure the trained model of a trial, and keep the results beside it."""
    directory = search.get_directory(sweep, search.get_number(trial))
    path = directory / "measured.json"
    return Measured(**frame.compute_once(path, lambda: measure(trial, directory)._asdict()))


def measure(trial: FrozenTrial, directory: Path) -> Measured:
    """Measure a trained model."""
    cells.load_cell(workdir.load_config(directory).model.cell)  # It may be in a file.
    trained = lstm_jax.load(directory)
    return Measured(
        trial.values[0],
        trial.user_attrs[search.TEST_LOSS],
        frame.evaluate(directory, "--split=test", f"--context={WINDOW}"),
        max(row["step"] for row in workdir.read_metrics(directory)),
        trial.duration.total_seconds(),  # type: ignore[union-attr]
        measure_speed(directory),
        measure_generation(trained),
        sum(array.size for array in jax.tree.leaves(trained.params)),
    )


def measure_generation(trained: lstm_jax.Run) -> float:
    """Return the characters a second of one generated text, compilation excluded."""
    arguments = trained.model, trained.params, np.full((1, 16), 2, np.int32), jax.random.key(0)

    def generate() -> None:
        for _ in generation.generate_chunks(*arguments, length=GENERATED):
            pass

    times = [time_call(generate) for _ in range(3)]
    return GENERATED / min(times)


def print_tables(results: Results, options: argparse.Namespace) -> None:
    """Print the tables in Markdown: means and standard deviations over seeds."""
    print(
        f"Tuned with {options.space.name}, {options.trials} trials of "
        f"{options.tune_epochs} epochs for each variant, on validation; "
        f"{options.seeds} seeds; {jax.devices()[0].device_kind}. Losses in nats per character."
    )
    losses = ("validation", "test", "test by windows")
    speeds = ("characters a second in training", "in generation")
    for budget, of_variants in results.items():
        print(f"\nEqual {budget}:\n")
        print_head("variant", "parameters", "steps", "seconds", *losses, *speeds)
        for name, runs in of_variants.items():
            columns = list(zip(*runs, strict=True))
            mean = Measured(*map(statistics.mean, columns))
            sizes = (mean.parameters, mean.steps, mean.seconds)
            means = [f"{x:,.0f}" for x in (*sizes, mean.training_speed, mean.generation_speed)]
            print_row(name, *means[:3], *(spread(x, 4) for x in columns[:3]), *means[3:])


if __name__ == "__main__":
    main()
