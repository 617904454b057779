"""Train PyTorch's LSTM for some minutes of the whole process; print its parameters and loss.

    python benchmarks/torch_lstm.py --ids ids.npz --run runs/quick --minutes 1

The arrays of --ids are the tokens of each split. Sizes, batch, learning rate, weight decay and
dropout are those of --run, a run of this project, but for recurrent dropout, the dropout of whole
embeddings and skip connections, which `torch.nn.LSTM` does not have. The carry is kept from window
to window. The dtype is the faster one on this machine, and the learning rate decays linearly to
zero at the end of the time. The loss, in nats, is that of the validation and test splits as one
text, with the parameters that have the best of about eight validation losses.
"""

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from frame import parse_flags

START = time.monotonic() - time.process_time()  # About the start of the process.
VALIDATIONS = 8


class Model(torch.nn.Module):
    """An embedding, layers of an LSTM, and a dense layer, with dropout between them."""

    def __init__(self, sizes: dict[str, Any], rates: dict[str, float], vocabulary_size: int):
        super().__init__()
        hidden, layers = sizes["hidden_size"], sizes["num_layers"]
        self.embedding = torch.nn.Embedding(vocabulary_size, sizes["embedding_size"])
        self.lstm = torch.nn.LSTM(
            sizes["embedding_size"],
            hidden,
            layers,
            batch_first=True,
            dropout=rates["hidden_dropout"],
        )
        self.dense = torch.nn.Linear(hidden, vocabulary_size)
        self.input_dropout = torch.nn.Dropout(rates["input_dropout"])
        self.output_dropout = torch.nn.Dropout(rates["output_dropout"])
        self.dtype = torch.float32

    def forward(self, ids: torch.Tensor, carry: Any) -> tuple[torch.Tensor, Any]:
        """Return the logits of windows of ids [batch, time], and the last carry."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden, carry = self.lstm(self.input_dropout(self.embedding(ids)), carry)
            return self.dense(self.output_dropout(hidden)).float(), carry

    @torch.no_grad()
    def measure_loss(self, ids: np.ndarray) -> float:
        """Return the mean loss of a text, of which 32 parts are read at once with their carry."""
        self.eval()
        total, count, carry = 0.0, 0, None
        for window in cut_windows(ids, 32, 256):
            logits, carry = self(window[:, :-1], carry)
            targets = window[:, 1:].flatten()
            total += cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            count += len(targets)
        self.train()
        return total / count


def cut_windows(ids: np.ndarray, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Yield consecutive windows of a batch of equal parts of a text, with the token after each."""
    part = (len(ids) - 1) // batch
    for first in range(0, part, length):
        rows = (
            ids[k * part + first : k * part + min(first + length, part) + 1] for k in range(batch)
        )
        yield torch.from_numpy(np.stack(list(rows)))


def cut_epochs(ids: np.ndarray, batch: int, length: int, seed: int) -> Iterator[Any]:
    """Yield windows, epoch after epoch from another place of the text, and whether one begins."""
    rng = np.random.default_rng(seed)
    while True:
        for k, window in enumerate(
            cut_windows(np.roll(ids, rng.integers(len(ids))), batch, length)
        ):
            yield window, k == 0


def main() -> None:
    """Train and measure."""
    options = parse_flags(__doc__, ids=Path, run=Path, minutes=float, seed=0)
    splits = {name: array.astype(np.int64) for name, array in np.load(options.ids).items()}
    last = np.append(splits["validation"], splits["test"])
    config = json.loads((options.run / "config.json").read_text())
    settings, batches = config["optimizer"], config["batches"]
    torch.manual_seed(options.seed)
    model = Model(config["model"], config["regularization"], 1 + max(map(np.max, splits.values())))
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=settings["weight_decay"], fused=True
    )
    windows = cut_epochs(
        splits["train"], batches["batch_size"], batches["window_length"], options.seed
    )
    carry: Any = None

    def train(rate: float) -> None:
        nonlocal carry
        window, is_first = next(windows)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        logits, carry = model(window[:, :-1], None if is_first else carry)
        carry = tuple(x.detach() for x in carry)
        cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_gradient_norm"])
        optimizer.step()

    def time_step(dtype: torch.dtype) -> float:
        nonlocal carry
        model.dtype, carry = dtype, None  # A carry has the dtype of its step.
        seconds = []
        for _ in range(4):
            start = time.monotonic()
            train(0.0)
            seconds.append(time.monotonic() - start)
        return min(seconds)

    model.dtype = min((torch.float32, torch.bfloat16), key=time_step)
    carry = None
    start = time.monotonic()
    model.measure_loss(splits["validation"])
    of_validation = time.monotonic() - start
    start, end = time.monotonic(), START + 60 * options.minutes - 4 * of_validation
    best: tuple[float, Any] = (np.inf, {})
    steps, spent, validations = 0, 0.0, 0
    while spent < 1:
        steps += 1
        train(
            settings["learning_rate"]
            * (1 - spent)
            * min(steps / max(settings["warmup_steps"], 1), 1)
        )
        spent = (time.monotonic() - start) / (end - start)
        if spent * VALIDATIONS > validations or spent >= 1:
            validations += 1
            loss = model.measure_loss(splits["validation"])
            best = min(best, (loss, copy.deepcopy(model.state_dict())), key=lambda x: x[0])
    model.load_state_dict(best[1])
    parameters = sum(array.numel() for array in model.parameters())
    result = {"parameters": parameters, "loss": model.measure_loss(last), "steps": steps}
    print(json.dumps(result | {"dtype": str(model.dtype)}))


if __name__ == "__main__":
    main()
