"""Compare nanoGPT's Transformer and experiments by minutes of training, on one machine.

    python benchmarks/nanogpt.py --nanogpt ../nanoGPT --out runs/nanogpt
    python benchmarks/nanogpt.py --nanogpt ../nanoGPT --models nanogpt:2000,quick:2 --seeds 1

`--nanogpt` is a checkout of github.com/karpathy/nanoGPT, whose train.py runs with the settings that
its README gives for a CPU; it needs PyTorch, which the extra `bench` installs. `nanogpt:N` is its
Transformer after N iterations, in float32; `nanogpt_compiled:N` the same with torch.compile, which
needs a C++ compiler, and autocast to bfloat16, which its train.py leaves out on a CPU. `NAME:N` is
experiments/NAME.py with N epochs, and `NAME` the same with its own number of epochs. All train in
turn on the same 90 % of Tiny Shakespeare, which nanoGPT reads as a dataset in its data/; a learning
rate schedule ends with the training. Minutes are those of the whole process.

Losses are of the last 10 %, the validation and test splits as one text. All these runs keep the
checkpoint with the best validation loss, nanoGPT's on this whole text:

- by windows: the mean over windows of 64 tokens, the length that nanoGPT trains with here, without
  context before them;
- with context: nanoGPT reads windows that begin every 16 tokens, and the last 16 of each count, so
  that every token has at least 48 before it. An LSTM keeps its carry through the whole text.

OUT/nanogpt.md and OUT/nanogpt.svg have the results, as means over seeds. The same command resumes
after an interruption; the minutes of an interrupted run are not counted.
"""

import argparse
import contextlib
import importlib
import json
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from lstm_jax import config
from lstm_jax.data.texts import read_splits
from lstm_jax.run import workdir

ROOT = Path(__file__).parents[1]
MODELS = (
    "nanogpt:2000,nanogpt:5000,nanogpt:10000,nanogpt_compiled:5000,"
    "quick:2,quick:4,quick:6,shakespeare_best"
)
DATASET = "lstm_jax_shakespeare"  # The dataset's directory in nanoGPT's data/.
WINDOW = 64  # Tokens.
PUBLISHED = 1.4697  # The loss that nanoGPT's README gives for its larger model.
# The settings that nanoGPT's README gives for a machine without a GPU.
SETTINGS = {
    "device": "cpu",
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": WINDOW,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
}
NANOGPT = {  # Settings, and the words of the table, by name.
    "nanogpt": ({"compile": False, "dtype": "float32"}, "nanoGPT, float32, untuned"),
    "nanogpt_compiled": ({"compile": True, "dtype": "bfloat16"}, "nanoGPT, compiled, bfloat16"),
}
# train.py with another seed than its own, the first argument, and with autocast on a CPU too.
RUN = (
    "import sys, torch; set_seed, seed = torch.manual_seed, int(sys.argv.pop(1)); "
    "torch.manual_seed = lambda own: set_seed(seed); sys.path.insert(0, '.'); "
    "text = open('train.py').read().replace(\"nullcontext() if device_type == 'cpu' else\", ''); "
    "exec(compile(text, 'train.py', 'exec'), {'__name__': '__main__'})"
)
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")


class Measured(NamedTuple):
    """Measurements of one trained model."""

    parameters: int
    by_windows: float  # Nats per character, like `with_context`.
    with_context: float


class Point(NamedTuple):
    """A model after some training, with all of its seeds."""

    model: str
    amount: int | None  # Iterations or epochs; None is what the experiment says.
    minutes: list[float]
    measured: list[Measured]


def main() -> None:
    """Do the remaining work, and write the table and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nanogpt"), help="[default: runs/nanogpt]"
    )
    parser.add_argument("--models", default=MODELS, help=f"[default: {MODELS}]")
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    options = parser.parse_args()
    if not (options.nanogpt / "train.py").exists():
        parser.error(f"{options.nanogpt} has no train.py: clone nanoGPT and name its directory")

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    held_out = write_dataset(options.nanogpt, read_splits(config.DataConfig()))
    points = []
    for name in options.models.split(","):
        model, _, amount = name.partition(":")
        point = Point(model, int(amount) if amount else None, [], [])
        for seed in range(options.seeds):
            path = out / f"{name.replace(':', '_')}_{seed}"
            if minutes := train(point, seed, path, options.nanogpt):
                point.minutes.append(minutes)
            point.measured.append(measure(point, path, options.nanogpt, held_out))
        points.append(point)
        print(make_row(point), flush=True)
    (out / "nanogpt.md").write_text("\n".join([*HEAD, *map(make_row, points)]) + "\n")
    draw_losses(points).savefig(out / "nanogpt.svg")
    print(f"Wrote {out / 'nanogpt.md'} and {out / 'nanogpt.svg'}")


def write_dataset(nanogpt: Path, splits: dict[str, str]) -> np.ndarray:
    """Write the files that nanoGPT reads; return the ids of its validation text, the last 10 %."""
    directory = nanogpt / "data" / DATASET
    directory.mkdir(exist_ok=True)
    texts = {"train": splits["train"], "val": splits["validation"] + splits["test"]}
    tokens = sorted(set("".join(texts.values())))
    numbers = {token: k for k, token in enumerate(tokens)}
    ids = {name: np.array([numbers[token] for token in text]) for name, text in texts.items()}
    for name, array in ids.items():
        array.astype(np.uint16).tofile(directory / f"{name}.bin")
    meta = {"vocab_size": len(tokens), "itos": dict(enumerate(tokens)), "stoi": numbers}
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta))
    return ids["val"]


def train(point: Point, seed: int, path: Path, nanogpt: Path) -> float | None:
    """Train a model into a directory; return the minutes, or None if it was interrupted."""
    done = path.with_suffix(".json")
    if done.exists():
        return json.loads(done.read_text())
    is_own = point.model not in NANOGPT
    whole = not (is_own and path.exists())
    start = time.perf_counter()
    if not is_own:
        shutil.rmtree(path, ignore_errors=True)  # It can't resume with the same random numbers.
        length = {"max_iters": point.amount, "lr_decay_iters": point.amount}
        own, _ = NANOGPT[point.model]
        settings = {**SETTINGS, **own, **length, "dataset": DATASET, "out_dir": path}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        run(nanogpt, "-c", RUN, seed, "config/train_shakespeare_char.py", *flags)
    else:
        flags = [f"--config=experiments/{point.model}.py", f"--config.seed={seed}"]
        if point.amount:
            flags.append(f"--config.num_epochs={point.amount}")
        run(ROOT, "-m", "lstm_jax.main", *flags, "--workdir", path)
    minutes = (time.perf_counter() - start) / 60 if whole else None
    done.write_text(json.dumps(minutes))
    return minutes


def run(directory: Path, *words: object) -> str:
    """Run a Python command and return its standard output."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=directory, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(point: Point, path: Path, nanogpt: Path, ids: np.ndarray) -> Measured:
    """Measure a trained model once, and keep the result beside it."""
    done = path.with_suffix(".measured.json")
    if not done.exists():
        is_own = point.model not in NANOGPT
        measured = measure_own(path) if is_own else measure_nanogpt(nanogpt, path, ids)
        done.write_text(json.dumps(measured._asdict()))
    return Measured(**json.loads(done.read_text()))


def measure_own(path: Path) -> Measured:
    """Measure a run of this project."""
    words = ("-m", "lstm_jax.evaluate", "--workdir", path, "--split", "validation+test")
    losses = [
        json.loads(run(ROOT, *words, *flags))["loss"] for flags in (["--context", WINDOW], [])
    ]
    params = workdir.load_trained(path).params
    return Measured(sum(array.size for array in jax.tree.leaves(params)), *losses)


def measure_nanogpt(nanogpt: Path, path: Path, ids: np.ndarray) -> Measured:
    """Measure a checkpoint of nanoGPT."""
    import torch

    sys.path.insert(0, str(nanogpt))
    gpt: Any = importlib.import_module("model")
    saved = torch.load(path / "ckpt.pt", map_location="cpu", weights_only=False)
    with contextlib.redirect_stdout(sys.stderr):  # It prints its number of parameters.
        model = gpt.GPT(gpt.GPTConfig(**saved["model_args"]))
    # The names of a compiled model have a prefix.
    model.load_state_dict({key.removeprefix("_orig_mod."): x for key, x in saved["model"].items()})
    model.eval()

    def loss(counted: int) -> float:
        windows = np.lib.stride_tricks.sliding_window_view(ids, WINDOW + 1)[::counted]
        losses = []
        with torch.no_grad():
            for some in np.array_split(windows, len(windows) // 256 + 1):
                inputs, targets = (
                    torch.from_numpy(np.array(x)) for x in (some[:, :-1], some[:, 1:])
                )
                logits, _ = model(inputs, targets)
                each = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), targets, reduction="none"
                )
                losses.append(each[:, -counted:].numpy().ravel())
        return float(np.concatenate(losses).mean())

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(parameters, loss(WINDOW), loss(WINDOW // 4))


HEAD = (
    f"| | parameters | minutes | by windows of {WINDOW} | with context |",
    "| --- | ---: | ---: | ---: | ---: |",
)


def make_row(point: Point) -> str:
    """Return a row of the table in Markdown: means and standard deviations over seeds."""

    def spread(values: Sequence[float], digits: int) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    parameters, by_windows, with_context = zip(*point.measured, strict=True)
    minutes = spread(point.minutes, 2) if point.minutes else "-"
    return (
        f"| {describe(point)} | {parameters[0] / 1e6:.2f} M | {minutes} | "
        f"{spread(by_windows, 3)} | {spread(with_context, 3)} |"
    )


def describe(point: Point) -> str:
    """Return the words for a point in the table."""
    of = "iterations" if point.model in NANOGPT else "epochs"
    name = name_model(point.model, "`{}.py`")
    return f"{name}, {point.amount:,} {of}" if point.amount else name


def name_model(model: str, own: str = "{}.py") -> str:
    """Return the words for a model, with a format for those of this project."""
    return NANOGPT[model][1] if model in NANOGPT else own.format(model)


def draw_losses(points: list[Point]) -> Figure:
    """Draw the mean losses by minutes: a line for each model and protocol."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.add_subplot(
        xlabel="minutes of training",
        ylabel="loss of validation + test, nats per character",
        xscale="log",
    )
    models = dict.fromkeys(point.model for point in points if point.minutes)
    for model, color in zip(models, COLORS, strict=False):
        own = [point for point in points if point.model == model and point.minutes]
        minutes = [statistics.mean(point.minutes) for point in own]
        name = name_model(model)
        for field, style, words in (
            ("with_context", "o-", "with context"),
            ("by_windows", "o:", f"by windows of {WINDOW}"),
        ):
            of_seeds = [[getattr(x, field) for x in point.measured] for point in own]
            means = [statistics.mean(losses) for losses in of_seeds]
            spreads = [statistics.stdev(x) if len(x) > 1 else 0 for x in of_seeds]
            label = f"{name}, {words}"
            axes.errorbar(
                minutes, means, spreads, fmt=style, color=color, markersize=4, label=label
            )
    label = "nanoGPT's README: 10.7 M parameters, 3 minutes on an A100"
    axes.axhline(PUBLISHED, color=COLORS[0], linestyle="--", linewidth=1, label=label)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
