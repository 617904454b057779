"""Compare the losses of three programs after equal minutes of their processes on one machine.

    python benchmarks/leaderboard.py --nanogpt ../nanoGPT
    python benchmarks/leaderboard.py --nanogpt ../nanoGPT --text bible.txt --minutes 1,4 --seeds 3

They train in turn on the first 90 % of a text, Tiny Shakespeare if --text is not given:

- lstm-jax: experiments/minutes.py with these minutes;
- LSTM in PyTorch: torch_lstm.py with the sizes and the dropout that lstm-jax chose;
- nanoGPT: train.py of --nanogpt, a checkout of github.com/karpathy/nanoGPT, in float32 with the
  settings that its README gives for a CPU. The number of iterations is that of the minutes, by the
  times of runs of 500 and 1,500. The learning rate is its default times the one of --factors whose
  loss is the lowest at the fewest minutes.

The extra `bench` installs PyTorch. Losses are those of the last 10 %, in nats per character, of
the checkpoint with the best loss of the validation half, nanoGPT's with the best loss of samples of
all. An LSTM keeps its carry through the text; nanoGPT reads windows of 64 that begin every 16
characters, and the last 16 of each count, so that every character has at least 48 before it.

Results are means over seeds. OUT/TEXT/leaderboard.svg is the plot. The same command
resumes after an interruption.
"""

import argparse
import contextlib
import importlib
import json
import pickle
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import frame
import lstm_jax
from lstm_jax import config
from lstm_jax.data.texts import read_splits

DATASET = "lstm_jax"  # The dataset's directory in nanoGPT's data/.
WINDOW = 64  # Tokens that nanoGPT reads.
LEARNING_RATE = 1e-3  # Of nanoGPT's settings; its schedule ends at a tenth.
FLAGS = (
    f"--device=cpu --eval_iters=20 --log_interval=100 --block_size={WINDOW} --batch_size=12 "
    f"--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --dataset={DATASET} --compile=False"
)
# train.py with another seed than its own, the first argument.
RUN = (
    "import sys, torch; set_seed, seed = torch.manual_seed, int(sys.argv.pop(1)); "
    "torch.manual_seed = lambda _: set_seed(seed); sys.path.insert(0, '.'); "
    "exec(compile(open('train.py').read(), 'train.py', 'exec'), {'__name__': '__main__'})"
)
COLORS = {"lstm-jax": "#0072B2", "LSTM in PyTorch": "#009E73", "nanoGPT": "#D55E00"}


class Measured(NamedTuple):
    """Measurements of one trained model."""

    minutes: float
    parameters: int
    loss: float


class Board:
    """All runs of one text."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.nanogpt: Path = options.nanogpt
        self.factors = [float(x) for x in options.factors.split(",")]
        self.text = str(Path(options.text).resolve()) if options.text else ""
        self.directory: Path = options.out / (Path(options.text).stem or "tiny_shakespeare")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.ids = self.directory / "ids.npz"
        self._write_ids()

    def _write_ids(self) -> None:
        """Write the ids of each split for PyTorch, and the files that nanoGPT reads."""
        splits = read_splits(config.DataConfig(path=self.text))
        tokens = sorted(set("".join(splits.values())))
        numbers = {token: k for k, token in enumerate(tokens)}
        ids = {x: np.array([numbers[c] for c in text], np.uint16) for x, text in splits.items()}
        np.savez(self.ids, allow_pickle=False, **ids)
        directory = self.nanogpt / "data" / DATASET
        directory.mkdir(exist_ok=True)
        ids["train"].tofile(directory / "train.bin")
        np.append(ids["validation"], ids["test"]).tofile(directory / "val.bin")
        meta = {"vocab_size": len(tokens), "itos": dict(enumerate(tokens)), "stoi": numbers}
        (directory / "meta.pkl").write_bytes(pickle.dumps(meta))

    def run_jax(self, minutes: float, seed: int) -> Measured:
        """Train with experiments/minutes.py."""
        file = frame.ROOT / "experiments" / "minutes.py"
        path = self._path(minutes, seed)
        flags = f"--config={file}:{minutes:g}", f"--config.data.path={self.text}"
        taken = frame.train(path, *flags, f"--config.seed={seed}")
        parameters = sum(array.size for array in jax.tree.leaves(lstm_jax.load(path).params))
        return Measured(taken, parameters, frame.evaluate(path, "--split=validation+test"))

    def run_torch(self, minutes: float, seed: int) -> Measured:
        """Train PyTorch's LSTM with the sizes of the run of `run_jax`."""
        words: list[object] = [frame.ROOT / "benchmarks" / "torch_lstm.py", "--ids", self.ids]
        words += ["--run", self._path(minutes, seed), "--minutes", minutes, "--seed", seed]
        output: list[str] = []
        taken = frame.time_call(lambda: output.append(frame.run_python(*words)))
        result = json.loads(output[0].splitlines()[-1])
        print(result, file=sys.stderr)
        return Measured(taken / 60, result["parameters"], result["loss"])

    def run_nanogpt(self, minutes: float, seed: int) -> Measured:
        """Train nanoGPT with its best learning rate."""

        def choose_rate() -> float:
            losses = {x: self._train_nanogpt(self._iterations(minutes), 0, x) for x in self.factors}
            print(losses, file=sys.stderr)
            return min(self.factors, key=lambda factor: losses[factor].loss)

        factor = frame.compute_once(self.directory / "factor.json", choose_rate)
        return self._train_nanogpt(self._iterations(minutes), seed, factor)

    def _iterations(self, minutes: float) -> int:
        """Return the iterations of nanoGPT in these minutes, from the times of two short runs."""
        few, many = 500, 1500
        measure = lambda: [self._train_nanogpt(x, 0, 1.0).minutes for x in (few, many)]  # noqa: E731
        short, long = frame.compute_once(self.directory / "speed.json", measure)
        return int(few + (many - few) * (minutes - short) / (long - short))

    def _train_nanogpt(self, iterations: int, seed: int, factor: float) -> Measured:
        path, rate = self.directory / "nanogpt", LEARNING_RATE * factor
        length = f"--max_iters={iterations} --lr_decay_iters={iterations}"
        length += f" --eval_interval={max(iterations // 4, 1)}"
        length += f" --learning_rate={rate} --min_lr={rate / 10} --out_dir={path}"
        shutil.rmtree(path, ignore_errors=True)
        command = "-c", RUN, seed, "config/train_shakespeare_char.py", *f"{FLAGS} {length}".split()
        seconds = frame.time_call(frame.run_python, *command, directory=self.nanogpt)
        return Measured(seconds / 60, *self._measure_nanogpt(path))

    def _measure_nanogpt(self, path: Path) -> tuple[int, float]:
        """Return the parameters of a checkpoint of nanoGPT, and its loss."""
        import torch

        sys.path.insert(0, str(self.nanogpt))
        gpt: Any = importlib.import_module("model")
        saved = torch.load(path / "ckpt.pt", map_location="cpu", weights_only=False)
        with contextlib.redirect_stdout(sys.stderr):  # It prints its number of parameters.
            model = gpt.GPT(gpt.GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        model.eval()
        ids, counted, losses = np.load(self.ids), WINDOW // 4, []
        last = np.append(ids["validation"], ids["test"]).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(last, WINDOW + 1)[::counted]
        with torch.no_grad():
            for some in np.array_split(windows, len(windows) // 256 + 1):
                tokens = torch.tensor(some)
                logits, _ = model(tokens[:, :-1], targets := tokens[:, 1:].contiguous())
                each = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
                losses.append(each[:, -counted:].numpy().ravel())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return parameters, float(np.concatenate(losses).mean())

    def _path(self, minutes: float, seed: int) -> Path:
        return self.directory / f"lstm_{minutes:g}_{seed}"


def main() -> None:
    """Do the remaining work; write the table and the plot."""
    options = frame.parse_flags(
        __doc__,
        nanogpt=Path,
        out=Path("runs/leaderboard"),
        text="",
        minutes="1,4,15,60",
        programs=",".join(COLORS),
        factors="2,4,8,16",
        seeds=3,
    )
    board = Board(options)
    runs = dict(zip(COLORS, (board.run_jax, board.run_torch, board.run_nanogpt), strict=True))
    points: dict[str, list[list[Measured]]] = {
        program: [] for program in options.programs.split(",")
    }
    frame.print_head("", "minutes asked", "taken", "parameters", "nats", "bits per character")
    for minutes in map(float, options.minutes.split(",")):
        for program, seeds in points.items():
            seeds.append([])
            for seed in range(options.seeds):
                name = f"{program.replace(' ', '_')}_{minutes:g}_{seed}.json"
                run = lambda: runs[program](minutes, seed)  # noqa: B023, E731
                seeds[-1].append(Measured(*frame.compute_once(board.directory / name, run)))
            taken, (parameters, *_), losses = zip(*seeds[-1], strict=True)
            bits = [loss / np.log(2) for loss in losses]
            spreads = frame.spread(taken, 2), f"{parameters / 1e6:.2f} M", frame.spread(losses)
            frame.print_row(program, f"{minutes:g}", *spreads, frame.spread(bits))
    path = board.directory / "leaderboard.svg"
    draw_losses(points, options.minutes.split(",")).savefig(path, metadata={"Date": None})
    print(f"Wrote {path}")


def draw_losses(points: dict[str, list[list[Measured]]], asked: list[str]) -> Figure:
    """Draw the mean losses by minutes, a line for each program; ticks are the minutes asked."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes", ylabel="loss, nats per character", xscale="log")
    for program, seeds in points.items():
        taken = [statistics.mean(run.minutes for run in runs) for runs in seeds]
        means = [statistics.mean(run.loss for run in runs) for runs in seeds]
        axes.plot(taken, means, "o-", color=COLORS[program], ms=4, label=program)
    axes.set_xticks([float(x) for x in asked], asked)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
