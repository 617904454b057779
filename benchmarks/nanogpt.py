"""Compare the loss and training time of nanoGPT's Transformer and of experiments on one machine.

    python benchmarks/nanogpt.py --nanogpt ../nanoGPT
    python benchmarks/nanogpt.py --nanogpt ../nanoGPT --configs quick,shakespeare_best

`--nanogpt` is a checkout of github.com/karpathy/nanoGPT, whose train.py runs with the settings that
its README gives for a CPU, for the given numbers of iterations; it needs PyTorch, which the extra
`bench` installs. All train in turn on the same 90 % of Tiny Shakespeare, which nanoGPT reads as a
dataset in its data/. Minutes are those of the whole process. Losses are of the last 10 %, the
validation and test splits as one text. nanoGPT measures the mean over windows without context
before them; the last column has the mean over characters with at least three quarters of a window
before them.
"""

import argparse
import contextlib
import importlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lstm_jax import config
from lstm_jax.data.texts import read_splits
from lstm_jax.run import workdir

ROOT = Path(__file__).parents[1]
# The dataset's directory in nanoGPT's data/.
DATASET = "lstm_jax_shakespeare"
# The settings that nanoGPT's README gives for a machine without a GPU.
SETTINGS = {
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
}


def main() -> None:
    """Train all models in turn; print a row of the table after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--iterations", default="2000,5000", help="[default: 2000,5000]")
    parser.add_argument("--configs", default="quick", help="[default: quick]")
    options = parser.parse_args()
    if not (options.nanogpt / "train.py").exists():
        parser.error(f"{options.nanogpt} has no train.py: clone nanoGPT and name its directory")

    splits = read_splits(config.default().data)
    held_out = _write_dataset(options.nanogpt, splits)
    print("| | parameters | minutes | nats per character | otherwise |")
    print("| --- | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as directory:
        for number in map(int, options.iterations.split(",")):
            out = Path(directory, f"nanogpt_{number}")
            minutes = _train_nanogpt(options.nanogpt, out, number)
            parameters, loss, with_context = _measure_nanogpt(options.nanogpt, out, held_out)
            _print(
                f"nanoGPT, {number:,} iterations",
                parameters,
                minutes,
                loss,
                f"{with_context:.3f} with 3/4 of a window before each",
            )
        for name in options.configs.split(","):
            out = Path(directory, name)
            words = ("--config", f"experiments/{name}.py", "--workdir", out)
            minutes = _minutes(ROOT, "-m", "lstm_jax.main", *words)
            loss, dynamic = _measure_own(out), _measure_own(out, "--dynamic")
            parameters = sum(
                array.size for array in jax.tree.leaves(workdir.load_trained(out).params)
            )
            _print(name, parameters, minutes, loss, f"{dynamic:.3f} with dynamic evaluation")


def _print(name: str, parameters: int, minutes: float, loss: float, otherwise: str) -> None:
    million = f"{parameters / 1e6:.2f} M"
    print(f"| {name} | {million} | {minutes:.1f} | {loss:.3f} | {otherwise} |", flush=True)


def _write_dataset(nanogpt: Path, splits: dict[str, str]) -> np.ndarray:
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


def _run(directory: Path, *words: object) -> str:
    """Run a Python command and return its standard output."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=directory, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _minutes(directory: Path, *words: object) -> float:
    """Return the minutes that a Python command takes."""
    start = time.perf_counter()
    _run(directory, *words)
    return (time.perf_counter() - start) / 60


def _train_nanogpt(nanogpt: Path, out: Path, iterations: int) -> float:
    settings = {
        **SETTINGS,
        "dataset": DATASET,
        "out_dir": out,
        "max_iters": iterations,
        "lr_decay_iters": iterations,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return _minutes(nanogpt, "train.py", "config/train_shakespeare_char.py", *flags)


def _measure_nanogpt(nanogpt: Path, out: Path, ids: np.ndarray) -> tuple[int, float, float]:
    """Return the number of parameters, and the losses of whole windows and of last quarters."""
    import torch

    sys.path.insert(0, str(nanogpt))
    gpt: Any = importlib.import_module("model")
    saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=False)
    with contextlib.redirect_stdout(sys.stderr):  # It prints its number of parameters.
        model = gpt.GPT(gpt.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    length = saved["model_args"]["block_size"]

    def loss(counted: int) -> float:
        windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::counted]
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
    return parameters, loss(length), loss(length // 4)


def _measure_own(out: Path, *flags: str) -> float:
    words = ("--workdir", out, "--split", "validation+test", *flags)
    return json.loads(_run(ROOT, "-m", "lstm_jax.evaluate", *words))["loss"]


if __name__ == "__main__":
    main()
