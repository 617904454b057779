"""Tune and train every variant of an experiment in the same way; write a table and a plot.

    python benchmarks/compare.py --out runs/cells
    python benchmarks/compare.py --out runs/cells --variants lstm,mingru --sampler grid \
        --space experiments/sweeps/learning_rate.py --trials 5 --tune_epochs 1
    python benchmarks/compare.py --out runs/optimizers --experiment experiments/optimizers.py \
        --space experiments/sweeps/optimizers.py --sampler grid --trials 10 --tune_epochs 1 \
        --budgets seconds

The variants of an experiment, experiments/cells.py by default, are the names in its VARIANTS. The
same command resumes an interrupted comparison, and several processes may run it at the same time.
For each variant it

1. tunes with `lstm_jax.sweep` on the validation split: the same space and the same number of trials
   for all;
2. trains the best settings with several seeds, each for --epochs;
3. trains them again, each for the number of steps that takes --seconds, at the speed of the fastest
   trial of step 1; start, compilation and validation are not counted;
4. measures each trained model: the loss of the test split with the carry kept, and by windows of
   256 from a zero carry; characters a second in training, and in generation of one text.

OUT/compare.md and OUT/compare.svg have the results, OUT/tune/VARIANT/report.html all trials of a
variant. --config.FIELD=VALUE flags are passed to every training, for example for a small test.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from frame import ROOT, load_module, parse_flags, run_python, spread
from lstm_jax import generation
from lstm_jax import loss as loss_lib
from lstm_jax.data import texts
from lstm_jax.devices import memory
from lstm_jax.run import metrics, workdir

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
    options = parse_flags(
        __doc__,
        True,
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
        names = list(load_module(options.experiment).VARIANTS)
    memory.keep_freed_memory()
    for name in names:
        tune(name, options)
    results: Results = {budget: {} for budget in options.budgets.split(",")}
    for budget, runs in results.items():
        for name in names:
            runs[name] = train(name, budget, options)
    table = make_table(results, options)
    (options.out / "compare.md").write_text(table)
    draw_losses(results).savefig(options.out / "compare.svg")
    print(f"{table}\nWrote {options.out / 'compare.md'} and {options.out / 'compare.svg'}")


def tune(name: str, options: argparse.Namespace) -> None:
    """Tune a variant, or continue, until its trials are done."""
    config, out = f"{options.experiment}:{name}", options.out / "tune" / name
    search = ("--space", options.space, "--sampler", options.sampler, "--pruner", "none")
    given = ("--config", config, *search, "--trials", options.trials, "--workdir", out)
    length = f"--config.num_epochs={options.tune_epochs}"
    run_python("-m", "lstm_jax.sweep", *given, *options.fields, length)


def train(name: str, budget: str, options: argparse.Namespace) -> list[Measured]:
    """Train the best settings of a variant with several seeds, and measure them."""
    out, tuned = options.out / budget / name, options.out / "tune" / name
    given = ("--seeds", options.seeds, "--population", 1, "--workdir", out)
    length = [f"--config.num_epochs={options.epochs}"]
    if budget == "seconds":
        steps = count_steps(tuned, options.seconds)
        length = ["--config.num_epochs=1000", f"--config.max_steps={steps}"]
    best = ("--config", tuned / "best.py")
    run_python("-m", "lstm_jax.sweep", *best, *given, *length, *options.fields)
    return list(measure_trials(out))


def count_steps(tuned: Path, seconds: float) -> int:
    """Return the number of steps that take these seconds in the fastest trial of a sweep."""
    trials = [path.parent for path in tuned.glob(f"trials/*/{workdir.METRICS}")]
    batches = workdir.load_config(trials[0]).batches
    speeds = [measure_speed(trial) for trial in trials]
    return max(round(seconds * max(speeds) / (batches.batch_size * batches.window_length)), 1)


def measure_speed(directory: Path) -> float:
    """Return the median of the tokens a second that a run logged in training."""
    rows = metrics.read_metrics(directory / workdir.METRICS)
    return statistics.median(row["tokens_per_second"] for row in rows if row["split"] == "train")


def measure_trials(out: Path) -> Iterator[Measured]:
    """Measure the trained models of a sweep once, and keep the results beside them."""
    for line in (out / "trials.jsonl").read_text().splitlines():
        trial = json.loads(line)
        if trial["state"] != "complete":
            continue
        path = Path(trial["workdir"]) / "measured.json"
        if not path.exists():
            path.write_text(json.dumps(measure(trial)._asdict()))
        yield Measured(**json.loads(path.read_text()))


def measure(trial: dict[str, Any]) -> Measured:
    """Measure a trained model."""
    trained = workdir.load_trained(trial["workdir"])
    rows = metrics.read_metrics(Path(trial["workdir"]) / workdir.METRICS)
    splits = texts.load_texts_of_run(trained.config.data, None, None, None)
    ids = np.asarray(splits["test"].encode(trained.vocabulary)[:])
    return Measured(
        trial["validation_loss"],
        trial["test_loss"],
        float(loss_lib.compute_token_losses(trained.model, trained.params, ids, WINDOW).mean()),
        max(row["step"] for row in rows),
        trial["seconds"],
        measure_speed(Path(trial["workdir"])),
        measure_generation(trained),
        sum(array.size for array in jax.tree.leaves(trained.params)),
    )


def measure_generation(trained: workdir.Trained) -> float:
    """Return the characters a second of one generated text, compilation excluded."""
    prompt = np.zeros((1, 16), np.int32) + 2
    seconds = []
    for seed in range(3):
        start = time.perf_counter()
        key = jax.random.key(seed)
        generation.generate_tokens(trained.model, trained.params, prompt, key, length=GENERATED)
        seconds.append(time.perf_counter() - start)
    return GENERATED / min(seconds)


def make_table(results: Results, options: argparse.Namespace) -> str:
    """Return the tables in Markdown: means and standard deviations over seeds."""
    head = (
        "variant, parameters, steps, seconds, validation, test, test by windows, "
        "characters a second in training, in generation"
    )
    lines = []
    for budget, of_variants in results.items():
        lines += [f"\nEqual {budget}:\n", f"| {head.replace(', ', ' | ')} |", "|" + " --- |" * 9]
        for name, runs in of_variants.items():
            mean = Measured(*map(statistics.mean, zip(*runs, strict=True)))
            losses = " | ".join(spread(x, 4) for x in list(zip(*runs, strict=True))[:3])
            lines.append(
                f"| {name} | {mean.parameters:,.0f} | {mean.steps:,.0f} | {mean.seconds:.0f} | "
                f"{losses} | {mean.training_speed:,.0f} | {mean.generation_speed:,.0f} |"
            )
    device = jax.devices()[0].device_kind
    start = (
        f"Tuned with {options.space.name}, {options.trials} trials of "
        f"{options.tune_epochs} epochs for each variant, on validation; "
        f"{options.seeds} seeds; {device}. Losses in nats per character.\n"
    )
    return start + "\n".join(lines) + "\n"


def draw_losses(results: Results) -> Figure:
    """Draw the test loss of every seed, by variant."""
    variants = list(next(iter(results.values())))
    figure = Figure(figsize=(7, 0.35 * len(variants) + 1.2), layout="constrained")
    axes = figure.add_subplot(xlabel="test loss, nats per character")
    for (budget, of_variants), color in zip(results.items(), ("#0072B2", "#D55E00"), strict=False):
        shift = 0.12 if budget == "seconds" else -0.12
        points = [
            (run.test, i + shift) for i, runs in enumerate(of_variants.values()) for run in runs
        ]
        label = f"equal {budget}"
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=color, label=label)
    axes.set_yticks(range(len(variants)), variants)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
