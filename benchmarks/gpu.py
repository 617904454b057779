"""Time this package on a GPU in ten minutes: training steps, generation, and a minute of quick.py.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --units 448,1024 --cells lstm --minutes 5

Implementations that do not run on the device are left out, as is PyTorch if it is missing.
--config.FIELD=VALUE flags are passed to the training. When 60 % of --minutes have passed, the
remaining steps are skipped.
"""

import argparse
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax

import sampling
import side_by_side
import train_step
from frame import ROOT, measure_speed, parse_flags, print_head, print_row
from lstm_jax.ops import choice, layer
from lstm_jax.run import metrics, workdir
from side_by_side import Make

# Dtype of matmuls, and precision of those in float32.
DTYPES = {"bfloat16": "float32", "TF32": "tensorfloat32", "float32": "float32"}
FASTER = 0.97  # Below this ratio of times, another choice is advised.


def main() -> None:
    """Measure and print the tables."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = parse_flags(
        __doc__,
        fields=True,
        units="448,1024,1840",
        cells="lstm,gru",
        batch_size=64,
        window_length=100,
        vocabulary_size=67,
        length=1000,
        rounds=10,
        minutes=10.0,
    )
    options.end = time.monotonic() + 0.6 * 60 * options.minutes
    vars(options).update(num_layers=1, tie_embeddings=False)
    side_by_side.print_machine(jax.devices()[0].device_kind, options)
    advice = time_steps(options)
    time_generation(options)
    train(options)
    print("\nauto", "should choose:" if advice else "chooses the fastest implementation everywhere")
    print("\n".join(advice))


def time_steps(options: argparse.Namespace) -> list[str]:
    """Print the times of training steps; return where `auto` should choose otherwise."""
    print_head("hidden units", "cell", "matmuls", "ms a step, the fastest first", "auto")
    units, advice = map(int, options.units.split(",")), []
    for size, name, cell in itertools.product(units, DTYPES, options.cells.split(",")):
        options.dtype = name.replace("TF32", "float32")
        options.hidden_size = options.embedding_size = size
        makes: dict[str, Make] = {
            recurrence: functools.partial(
                train_step.make_lstm_jax, recurrence=recurrence, cell=cell
            )
            for recurrence in ("xla", "scan", "c", "cudnn", "pallas")
        }
        makes["PyTorch"] = functools.partial(train_step.make_torch, cell=cell)
        times = time_all(makes, DTYPES[name], options)
        gating = next(x for x in layer.GATINGS.values() if x.name == cell)
        given = {"size": size, "batch": options.batch_size, "dtype": options.dtype}
        chosen = choice.choose("auto", gating, **given)
        listed = ", ".join(
            f"{key} {1000 * times[key]:.2f}" for key in sorted(times, key=times.__getitem__)
        )
        print_row(f"{size:,}", cell, name, listed or "skipped", chosen)
        ours = {key: value for key, value in times.items() if key != "PyTorch"}
        if ours and min(ours.values()) < FASTER * ours[chosen]:
            advice.append(f"{min(ours, key=ours.__getitem__)} for {size:,} units, {cell}, {name}")
    return advice


def time_all(
    makes: Mapping[str, Make], precision: str, options: argparse.Namespace
) -> dict[str, float]:
    """Return the median seconds of the work that can run here; nothing after `options.end`."""
    works = {}
    with jax.default_matmul_precision(precision):
        for name, make in makes.items():
            if time.monotonic() > options.end:
                return {}
            with contextlib.suppress(ImportError, ValueError):  # It does not run here.
                works[name] = make(options)
                set_precision_of_torch(precision)
                for _ in range(2):
                    works[name].run()
        runs = [
            {name: side_by_side.time_work(work) for name, work in works.items()}
            for _ in range(options.rounds)
        ]
    return {name: side_by_side.find_medians([x[name] for x in runs]).seconds for name in works}


def set_precision_of_torch(precision: str) -> None:
    """Set the precision of PyTorch's matmuls in float32, if it is in use."""
    if torch := sys.modules.get("torch"):
        is_exact = precision == "float32"
        torch.set_float32_matmul_precision("highest" if is_exact else "high")
        torch.backends.cudnn.allow_tf32 = not is_exact


def time_generation(options: argparse.Namespace) -> None:
    """Print the tokens a second of generation, in bfloat16."""
    print()
    print_head("hidden units", "texts", "tokens/s", "PyTorch")
    options.dtype, options.end = "bfloat16", float("inf")
    for units, texts in itertools.product(options.units.split(","), (1, 64)):
        options.hidden_size = options.embedding_size = int(units)
        options.num_samples = texts
        makes: dict[str, Make] = {"ours": sampling._lstm_jax, "PyTorch": sampling._torch}
        times = time_all(makes, "float32", argparse.Namespace(**{**vars(options), "rounds": 3}))
        tokens = texts * options.length
        rates = [f"{tokens / times[x]:,.0f}" if x in times else "-" for x in makes]
        print_row(f"{int(units):,}", texts, *rates)


def train(options: argparse.Namespace) -> None:
    """Train quick.py for a minute at most, and print its speed and its best loss."""
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--config=experiments/quick.py", f"--workdir={directory}", *options.fields]
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = [sys.executable, "-m", "lstm_jax.main", *flags]
            subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60)
        rows = metrics.read_metrics(Path(directory) / workdir.METRICS)
        losses = [row["loss"] for row in rows if row["split"] == "validation"]
        speed, step = measure_speed(Path(directory)), max([row["step"] for row in rows] or [0])
    best = f"{min(losses):.3f}" if losses else "not computed"
    print(f"\nquick.py: {speed:,.0f} tokens/s, {step:,} steps, validation {best}")


if __name__ == "__main__":
    main()
