"""Tune and train every cell of experiments/cells.py, and write the table and the picture.

    python benchmarks/cells.py --out runs/cells
    python benchmarks/cells.py --out runs/cells --cells lstm,mingru --sampler grid \
        --space experiments/sweeps/learning_rate.py --trials 5 --tune_epochs 1
    python benchmarks/cells.py --speed

The same command continues what was cut off, and several processes may run it at the same time. For
each cell it

1. tunes with `lstm_jax.sweep` on the validation split: the same space for all, the same number of
   trials, and at most the same seconds;
2. trains the best settings with several seeds, each for --epochs;
3. trains them again, each for the number of steps that takes --seconds, at the speed of the fastest
   trial of step 1; start, compilation and validation are not counted;
4. measures each trained model: the loss of the test split with the carry kept, and by windows of
   256 from a zero carry; characters a second in training, and in generation of one text.

OUT/cells.md and OUT/cells.svg have the results, OUT/tune/CELL/report.html all trials of a cell.
--config.FIELD=VALUE flags are passed to every training, for example for a small test.

--speed instead times a training step of each cell's layers with every recurrence that it has, by
the length of the window.
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
import optax
from matplotlib.figure import Figure

from lstm_jax import config as config_lib
from lstm_jax import generation, model
from lstm_jax import loss as loss_lib
from lstm_jax.data import texts
from lstm_jax.devices import memory
from lstm_jax.run import metrics, workdir

ROOT = Path(__file__).parents[1]
EXPERIMENT, SPACE = ROOT / "experiments" / "cells.py", ROOT / "experiments" / "sweeps" / "cells.py"
WINDOW = 256  # Tokens.
GENERATED = 1000  # Tokens.
VOCABULARY_SIZE = 67  # Of --speed.


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


Results = dict[str, dict[str, list[Measured]]]  # By budget and cell: a run for each seed.


def main() -> None:
    """Do what is left to do, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/cells"), help="[default: runs/cells]"
    )
    parser.add_argument("--cells", help="names in experiments/cells.py [default: all]")
    parser.add_argument(
        "--space", type=Path, default=SPACE, help="[default: experiments/sweeps/cells.py]"
    )
    parser.add_argument("--sampler", default="tpe", help="of lstm_jax.sweep [default: tpe]")
    parser.add_argument("--trials", type=int, default=20, help="of each cell [default: 20]")
    parser.add_argument("--tune_epochs", type=int, help="of a trial [default: --epochs]")
    parser.add_argument(
        "--tune_seconds", type=float, default=7200, help="of each cell [default: 7200]"
    )
    parser.add_argument("--epochs", type=int, default=6, help="[default: 6]")
    parser.add_argument("--seconds", type=float, default=180, help="[default: 180]")
    parser.add_argument(
        "--budgets", default="steps,seconds", help="what is equal [default: steps,seconds]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--speed", action="store_true", help="time the recurrences")
    parser.add_argument("--lengths", default="96,512,4096", help="[default: 96,512,4096]")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed [default: 5]")
    options, fields = parser.parse_known_args()
    if unknown := [field for field in fields if not field.startswith("--config.")]:
        parser.error(f"unknown flag {unknown[0]}")
    experiments = load_experiments()
    names = options.cells.split(",") if options.cells else list(experiments._MODELS)
    memory.keep_freed_memory()
    if options.speed:
        time_recurrences(experiments, names, options.lengths, options.rounds)
        return
    for name in names:
        tune(name, options, fields)
    results: Results = {budget: {} for budget in options.budgets.split(",")}
    for budget, runs in results.items():
        for name in names:
            runs[name] = train(name, budget, options, fields)
    table = make_table(results, options)
    (options.out / "cells.md").write_text(table)
    draw_losses(results).savefig(options.out / "cells.svg")
    print(f"{table}\nWrote {options.out / 'cells.md'} and {options.out / 'cells.svg'}")


def load_experiments() -> Any:
    """Return the module experiments/cells.py."""
    spec = importlib.util.spec_from_file_location("experiments_cells", EXPERIMENT)
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
    """Tune a cell, or continue, until its trials are done or its seconds are used."""
    out = options.out / "tune" / name
    out.mkdir(parents=True, exist_ok=True)
    clock = out / "seconds.json"
    used = json.loads(clock.read_text()) if clock.exists() else 0.0
    if used >= options.tune_seconds and (out / "best.py").exists():
        return
    start = time.monotonic()
    config = f"{EXPERIMENT}:{name}"
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
    """Train the best settings of a cell with several seeds, and measure them."""
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
    batches = load_experiments().get_config().batches
    speeds = [measure_speed(path.parent) for path in tuned.glob(f"trials/*/{workdir.METRICS}")]
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
        "cell, parameters, steps, seconds, validation, test, test by windows, characters a second "
        "in training, in generation"
    )
    lines = []
    for budget, of_cells in results.items():
        lines += [f"\nEqual {budget}:\n", f"| {head.replace(', ', ' | ')} |", "|" + " --- |" * 9]
        for name, runs in of_cells.items():
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
        f"{options.tune_epochs or options.epochs} epochs for each cell, on validation; "
        f"{options.seeds} seeds; {device}. Losses in nats per character.\n"
    )
    return start + "\n".join(lines) + "\n"


def draw_losses(results: Results) -> Figure:
    """Draw the test loss of every seed, by cell."""
    cells = list(next(iter(results.values())))
    figure = Figure(figsize=(7, 0.35 * len(cells) + 1.2), layout="constrained")
    axes = figure.add_subplot(xlabel="test loss, nats per character")
    for (budget, of_cells), color in zip(results.items(), ("#0072B2", "#D55E00"), strict=False):
        shift = 0.12 if budget == "seconds" else -0.12
        points = [(run.test, i + shift) for i, runs in enumerate(of_cells.values()) for run in runs]
        label = f"equal {budget}"
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=color, label=label)
    axes.set_yticks(range(len(cells)), cells)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def time_recurrences(experiments: Any, names: Sequence[str], lengths: str, rounds: int) -> None:
    """Print the milliseconds of loss and gradient, by cell, recurrence and length of the window.

    A batch has 3,072 tokens, as in experiments/cells.py, or one window that is longer.
    """
    print(f"{jax.devices()[0].device_kind}, {len(jax.devices())} devices\n")
    print("| cell | window | recurrence | ms |\n| --- | ---: | --- | ---: |")
    for name in names:
        config = config_lib.complete_config(experiments.get_config(name))
        for length in map(int, lengths.split(",")):
            shape = (max(3072 // length, 1), length)
            ids = np.random.default_rng(0).integers(VOCABULARY_SIZE, size=shape)
            for recurrence in ("scan", "parallel", "fused"):
                config.model.recurrence = recurrence
                made = model.make_model(config.model, VOCABULARY_SIZE)
                try:
                    made.implementation()
                except ValueError:  # The cell has no such form.
                    continue
                seconds = time_step(made, ids, rounds)
                print(f"| {name} | {length} | {recurrence} | {1000 * seconds:.1f} |", flush=True)


def time_step(made: model.LanguageModel, ids: np.ndarray, rounds: int) -> float:
    """Return the median seconds of a loss and its gradient."""

    def compute_loss(params: model.Params) -> jax.Array:
        logits, _ = model.apply(made, params, ids, made.initial_carry(len(ids)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    params = model.init_params(made, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(compute_loss))
    jax.block_until_ready(step(params))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(step(params))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
