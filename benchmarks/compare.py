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

1. tunes with `lstm_jax.sweep` on the validation split: the same space for all, the same number of
   trials, and at most the same seconds;
2. trains the best settings with several seeds, each for --epochs;
3. trains them again, each for the number of steps that takes --seconds, at the speed of the fastest
   trial of step 1; start, compilation and validation are not counted;
4. measures each trained model: the loss of the test split with the carry kept, and by windows of
   256 from a zero carry; characters a second in training, and in generation of one text.

OUT/compare.md and OUT/compare.svg have the results, OUT/tune/VARIANT/report.html all trials of a
variant. --config.FIELD=VALUE flags are passed to every training, for example for a small test.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from lstm_jax import generation
from lstm_jax import loss as loss_lib
from lstm_jax.data import texts
from lstm_jax.devices import memory
from lstm_jax.run import metrics, workdir

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/cells"), help="[default: runs/cells]"
    )
    parser.add_argument(
        "--experiment",
        type=Path,
        default=EXPERIMENTS / "cells.py",
        help="[default: experiments/cells.py]",
    )
    parser.add_argument("--variants", help="variants to compare, by name [default: all]")
    parser.add_argument(
        "--space",
        type=Path,
        default=EXPERIMENTS / "sweeps" / "cells.py",
        help="[default: experiments/sweeps/cells.py]",
    )
    parser.add_argument("--sampler", default="tpe", help="sampler of lstm_jax.sweep [default: tpe]")
    parser.add_argument("--trials", type=int, default=20, help="trials per variant [default: 20]")
    parser.add_argument("--tune_epochs", type=int, help="epochs per trial [default: --epochs]")
    parser.add_argument(
        "--tune_seconds", type=float, default=7200, help="limit per variant [default: 7200]"
    )
    parser.add_argument("--epochs", type=int, default=6, help="[default: 6]")
    parser.add_argument("--seconds", type=float, default=180, help="[default: 180]")
    parser.add_argument(
        "--budgets", default="steps,seconds", help="budgets to equalize [default: steps,seconds]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    options, fields = parser.parse_known_args()
    if unknown := [field for field in fields if not field.startswith("--config.")]:
        parser.error(f"unknown flag {unknown[0]}")
    chosen = options.variants
    names = chosen.split(",") if chosen else list(load_module(options.experiment).VARIANTS)
    memory.keep_freed_memory()
    for name in names:
        tune(name, options, fields)
    results: Results = {budget: {} for budget in options.budgets.split(",")}
    for budget, runs in results.items():
        for name in names:
            runs[name] = train(name, budget, options, fields)
    table = make_table(results, options)
    (options.out / "compare.md").write_text(table)
    draw_losses(results).savefig(options.out / "compare.svg")
    print(f"{table}\nWrote {options.out / 'compare.md'} and {options.out / 'compare.svg'}")


def load_module(path: Path) -> Any:
    """Return the module in the file of an experiment."""
    spec = importlib.util.spec_from_file_location(f"experiments_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep(*arguments: object, seconds: float | None = None) -> None:
    """Run `lstm_jax.sweep`; end it after this number of seconds, as Ctrl-C does."""
    command = [sys.executable, "-m", "lstm_jax.sweep", *map(str, arguments)]
    process = subprocess.Popen(command)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return
    except KeyboardInterrupt:
        process.wait()  # It has the signal, too, and saves.
        raise
    if code:
        sys.exit(code)


def tune(name: str, options: argparse.Namespace, fields: Sequence[str]) -> None:
    """Tune a variant, or continue, until its trials are done or its seconds are used."""
    out = options.out / "tune" / name
    out.mkdir(parents=True, exist_ok=True)
    clock = out / "seconds.json"
    used = json.loads(clock.read_text()) if clock.exists() else 0.0
    if used >= options.tune_seconds and (out / "best.py").exists():
        return
    start = time.monotonic()
    config = f"{options.experiment}:{name}"
    search = ("--space", options.space, "--sampler", options.sampler, "--pruner", "none")
    given = ("--config", config, *search, "--trials", options.trials, "--workdir", out)
    length = f"--config.num_epochs={options.tune_epochs or options.epochs}"
    try:
        sweep(*given, *fields, length, seconds=max(options.tune_seconds - used, 1))
    finally:
        clock.write_text(json.dumps(used + time.monotonic() - start))
    if not (out / "best.py").exists():
        sys.exit(f"no trial of {name} is complete after {options.tune_seconds} seconds")


def train(
    name: str, budget: str, options: argparse.Namespace, fields: Sequence[str]
) -> list[Measured]:
    """Train the best settings of a variant with several seeds, and measure them."""
    out = options.out / budget / name
    best = options.out / "tune" / name / "best.py"
    given = ("--seeds", options.seeds, "--population", 1, "--workdir", out)
    length = [f"--config.num_epochs={options.epochs}"]
    if budget == "seconds":
        steps = count_steps(options.out / "tune" / name, options.seconds)
        length = ["--config.num_epochs=1000", f"--config.max_steps={steps}"]
    sweep("--config", best, *given, *length, *fields)
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

    def spread(values: list[float]) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.4f} ± {deviation:.4f}"

    head = (
        "variant, parameters, steps, seconds, validation, test, test by windows, "
        "characters a second in training, in generation"
    )
    lines = []
    for budget, of_variants in results.items():
        lines += [f"\nEqual {budget}:\n", f"| {head.replace(', ', ' | ')} |", "|" + " --- |" * 9]
        for name, runs in of_variants.items():
            mean = Measured(*map(statistics.mean, zip(*runs, strict=True)))
            validation, test, windows = (spread(list(x)) for x in list(zip(*runs, strict=True))[:3])
            lines.append(
                f"| {name} | {mean.parameters:,.0f} | {mean.steps:,.0f} | {mean.seconds:.0f} | "
                f"{validation} | {test} | {windows} | {mean.training_speed:,.0f} | "
                f"{mean.generation_speed:,.0f} |"
            )
    device = jax.devices()[0].device_kind
    start = (
        f"Tuned with {options.space.name}, at most {options.trials} trials of "
        f"{options.tune_epochs or options.epochs} epochs for each variant, on validation; "
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
