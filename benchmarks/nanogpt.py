"""Compare nanoGPT's Transformer and experiments by minutes of training, on one machine.

    python benchmarks/nanogpt.py --nanogpt ../nanoGPT --out runs/nanogpt
    python benchmarks/nanogpt.py --nanogpt ../nanoGPT --models nanogpt:2000,quick:2 --seeds 1
    python benchmarks/nanogpt.py --nanogpt ../nanoGPT --text bible.txt --factors 0.5,1,2,4

`--nanogpt` is a checkout of github.com/karpathy/nanoGPT, whose train.py runs with the settings that
its README gives for a CPU; it needs PyTorch, which the extra `bench` installs. `nanogpt:N` is its
Transformer after N iterations, a multiple of 250, in float32; `nanogpt_compiled:N` the same with
torch.compile, which needs a C++ compiler, and autocast to bfloat16, which its train.py leaves out
on a CPU. `NAME:N` is experiments/NAME.py with N epochs, and `NAME` the same with its own number.
All train in turn on the same 90 % of a text, Tiny Shakespeare if --text is not given, which nanoGPT
reads as a dataset in its data/; a learning rate schedule ends with the training. Minutes are those
of the whole process. For each model, one run per factor is trained at the length of its first row,
with its own learning rate times the factor. All its rows have the factor with the lowest loss of
the validation split, with context.

Losses are of the last 10 %, the validation and test splits as one text. All these runs keep the
checkpoint with the best validation loss, nanoGPT's on this whole text:

- by windows: the mean over windows of 64 tokens, the length that nanoGPT trains with here, without
  context before them;
- with context: nanoGPT reads windows that begin every 16 tokens, and the last 16 of each count, so
  that every token has at least 48 before it. An LSTM keeps its carry through the whole text.

Results are means over seeds; OUT/nanogpt.svg is the plot, and OUT/TEXT/nanogpt.svg that of another
text. The same command resumes after an interruption; the minutes of an interrupted run are those
after the last start.
"""

import argparse
import contextlib
import importlib
import pickle
import runpy
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import frame
import lstm_jax
from lstm_jax import config
from lstm_jax.data.texts import read_splits
from lstm_jax.run import cell_file, workdir

MODELS = "nanogpt:1500,nanogpt:500,nanogpt:3000,quick:3,quick:1,quick:6"
NANOGPT = {  # Flags, and the words of the plot, by name.
    "nanogpt": ("--compile=False --dtype=float32", "nanoGPT, float32"),
    "nanogpt_compiled": ("--compile=True --dtype=bfloat16", "nanoGPT, compiled, bfloat16"),
}
LEARNING_RATE = 1e-3  # Of nanoGPT's settings; its schedule ends at a tenth.
DATASET = "lstm_jax"  # The dataset's directory in nanoGPT's data/.
WINDOW = 64  # Tokens.
PUBLISHED = 1.4697  # The loss that nanoGPT's README gives for its larger model.
# The settings that nanoGPT's README gives for a machine without a GPU.
FLAGS = (
    f"--device=cpu --eval_iters=20 --log_interval=1 --block_size={WINDOW} --batch_size=12 "
    f"--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --dataset={DATASET}"
)
# train.py with another seed than its own, the first argument, and with autocast on a CPU too.
RUN = (
    "import sys, torch; set_seed, seed = torch.manual_seed, int(sys.argv.pop(1)); "
    "torch.manual_seed = lambda _: set_seed(seed); sys.path.insert(0, '.'); "
    "text, old = open('train.py').read(), \"nullcontext() if device_type == 'cpu' else\"; "
    "assert old in text; text = text.replace(old, ''); "
    "exec(compile(text, 'train.py', 'exec'), {'__name__': '__main__'})"
)
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")


class Measured(NamedTuple):
    """Measurements of one trained model."""

    minutes: float
    parameters: int
    by_windows: float  # Nats per character, like `with_context`.
    with_context: float
    validation: float  # The same for the validation split alone.


Splits = dict[str, np.ndarray]  # Ids by split; "val" is validation and test as one text.
Points = dict[str, list[Measured]]  # By model and its amount of training: one for each seed.


def main() -> None:
    """Do the remaining work; print the table and draw the plot."""
    options = frame.parse_flags(
        __doc__,
        nanogpt=Path,
        out=Path("runs/nanogpt"),
        text="",
        models=MODELS,
        factors="0.5,1,2,4,8,16",
        seeds=3,
    )
    options.out = options.out / Path(options.text).stem
    options.out.mkdir(parents=True, exist_ok=True)
    options.text = str(Path(options.text).resolve()) if options.text else ""
    splits = write_dataset(options.nanogpt, read_splits(config.DataConfig(path=options.text)))
    factors = [float(factor) for factor in options.factors.split(",")]
    best: dict[str, float] = {}  # The factor of the learning rate, by model.
    points: Points = {}
    frame.print_head("", "parameters", "minutes", f"by windows of {WINDOW}", "with context")
    for name in options.models.split(","):
        model = name.partition(":")[0]
        if model not in best:
            tried = {factor: run(name, 0, factor, splits, options) for factor in factors}
            best[model] = min(factors, key=lambda factor: tried[factor].validation)
            losses = {factor: round(measured.validation, 4) for factor, measured in tried.items()}
            print(f"{name}: validation losses by factor {losses}", file=sys.stderr)
        seeds = range(options.seeds)
        points[name] = [run(name, seed, best[model], splits, options) for seed in seeds]
        minutes, (parameters, *_), by_windows, with_context, _ = zip(*points[name], strict=True)
        spreads = frame.spread(minutes, 2), frame.spread(by_windows), frame.spread(with_context)
        frame.print_row(f"`{name}`", f"{parameters / 1e6:.2f} M", *spreads)
    figure = draw_losses(points, with_published=not options.text)
    figure.savefig(options.out / "nanogpt.svg")
    print(f"Wrote {options.out / 'nanogpt.svg'}")


def run(
    name: str, seed: int, factor: float, splits: Splits, options: argparse.Namespace
) -> Measured:
    """Train a model with a factor of its learning rate and measure it, unless that is done."""
    path = options.out / f"{name.replace(':', '_')}_{seed}{f'_x{factor:g}' * (factor != 1)}"
    file = path.parent / f"{path.name}.json"

    def measure() -> Measured:
        if name.partition(":")[0] in NANOGPT:
            return run_nanogpt(name, seed, factor, path, options.nanogpt, splits)
        return run_experiment(name, seed, factor, path, options.text)

    return Measured(*frame.compute_once(file, measure))


def write_dataset(nanogpt: Path, splits: dict[str, str]) -> Splits:
    """Write the files that nanoGPT reads, with the last 10 % as "val"; return all ids."""
    directory = nanogpt / "data" / DATASET
    directory.mkdir(exist_ok=True)
    tokens = sorted(set("".join(splits.values())))
    numbers = {token: k for k, token in enumerate(tokens)}
    ids = {name: np.array([numbers[token] for token in text]) for name, text in splits.items()}
    ids["val"] = np.append(ids["validation"], ids["test"])
    for name in ("train", "val"):
        ids[name].astype(np.uint16).tofile(directory / f"{name}.bin")
    meta = {"vocab_size": len(tokens), "itos": dict(enumerate(tokens)), "stoi": numbers}
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta))
    return ids


def run_experiment(name: str, seed: int, factor: float, path: Path, text: str) -> Measured:
    """Train an experiment of this project, or resume, and measure it."""
    experiment, _, epochs = name.partition(":")
    file = frame.ROOT / "experiments" / f"{experiment}.py"
    rate = runpy.run_path(str(file))["get_config"]().optimizer.learning_rate * factor
    flags = [f"--config={file}", f"--config.seed={seed}", f"--config.data.path={text}"]
    flags += [f"--config.optimizer.learning_rate={rate}"]
    minutes = frame.train(path, *flags, *[f"--config.num_epochs={epochs}"] * bool(epochs))
    cell_file.load_cell(workdir.load_config(path).model.cell)  # It may be in a file.
    parameters = sum(array.size for array in jax.tree.leaves(lstm_jax.load(path).params))
    last = "--split=validation+test"
    measured = (last, f"--context={WINDOW}"), (last,), ("--split=validation",)
    return Measured(minutes, parameters, *(frame.evaluate(path, *flags) for flags in measured))


def run_nanogpt(
    name: str, seed: int, factor: float, path: Path, nanogpt: Path, splits: Splits
) -> Measured:
    """Train nanoGPT, and measure it."""
    model, _, number = name.partition(":")
    rate = LEARNING_RATE * factor
    length = f"--max_iters={number} --lr_decay_iters={number}"
    length += f" --learning_rate={rate} --min_lr={rate / 10}"
    flags = (*f"{FLAGS} {NANOGPT[model][0]} {length}".split(), f"--out_dir={path}")

    def train() -> None:
        shutil.rmtree(path, ignore_errors=True)  # It can't resume with the same random numbers.
        shakespeare = "config/train_shakespeare_char.py"
        frame.run_python("-c", RUN, seed, shakespeare, *flags, directory=nanogpt)

    minutes = frame.time_call(train) / 60
    return Measured(minutes, *measure_nanogpt(nanogpt, path, splits))


def measure_nanogpt(nanogpt: Path, path: Path, splits: Splits) -> tuple[int, float, float, float]:
    """Return the parameters of a checkpoint of nanoGPT, and its losses."""
    import torch

    sys.path.insert(0, str(nanogpt))
    gpt: Any = importlib.import_module("model")
    saved = torch.load(path / "ckpt.pt", map_location="cpu", weights_only=False)
    with contextlib.redirect_stdout(sys.stderr):  # It prints its number of parameters.
        model = gpt.GPT(gpt.GPTConfig(**saved["model_args"]))
    # The names of a compiled model have a prefix.
    model.load_state_dict({key.removeprefix("_orig_mod."): x for key, x in saved["model"].items()})
    model.eval()

    @torch.no_grad()
    def loss(split: str, counted: int) -> float:
        windows = np.lib.stride_tricks.sliding_window_view(splits[split], WINDOW + 1)[::counted]
        losses = []
        for some in np.array_split(windows, len(windows) // 256 + 1):
            tokens = torch.tensor(some)
            logits, _ = model(tokens[:, :-1], targets := tokens[:, 1:].contiguous())
            each = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
            losses.append(each[:, -counted:].numpy().ravel())
        return float(np.concatenate(losses).mean())

    parameters = sum(parameter.numel() for parameter in model.parameters())
    with_context = loss("val", WINDOW // 4), loss("validation", WINDOW // 4)
    return parameters, loss("val", WINDOW), *with_context


def draw_losses(points: Points, with_published: bool) -> Figure:
    """Draw the mean losses by windows, by minutes: a line for each model."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.add_subplot(
        xlabel="minutes of training",
        ylabel=f"loss by windows of {WINDOW}, nats per character",
        xscale="log",
    )
    models = dict.fromkeys(name.partition(":")[0] for name in points)
    for model, color in zip(models, COLORS, strict=False):
        seeds = [of for name, of in points.items() if name.partition(":")[0] == model]
        seeds.sort(key=lambda runs: runs[0].minutes)
        minutes = [statistics.mean(run.minutes for run in runs) for runs in seeds]
        losses = [[run.by_windows for run in runs] for runs in seeds]
        spreads = [statistics.stdev(x) if len(x) > 1 else 0 for x in losses]
        means = [statistics.mean(x) for x in losses]
        label = NANOGPT[model][1] if model in NANOGPT else f"{model}.py, bfloat16"
        axes.errorbar(minutes, means, spreads, fmt="o-", color=color, ms=4, label=label)
    if with_published:
        label = "nanoGPT's README: 10.7 M parameters, 3 minutes on an A100, windows of 256"
        axes.axhline(PUBLISHED, color=COLORS[0], linestyle="--", linewidth=1, label=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
