"""Train an LSTM of PyTorch for some minutes of the whole process; print its parameters and loss.

    python benchmarks/torch_lstm.py --ids ids.npz --run runs/quick --minutes 1

The arrays of --ids are the tokens of each split. Sizes, batch, learning rate, weight decay and
dropout are those of a run of this project, but recurrent dropout and skip connections, which
`torch.nn.LSTM` does not have. The carry is kept from window to window. The dtype is the faster
one on this machine; the learning rate decays linearly to zero at the end of the time. The loss of
the validation and test splits as one text is that of the parameters with the best of eight
validations.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

START = time.monotonic() - time.process_time()  # Nearly the start of the process.
VALIDATIONS = 8


class Model(torch.nn.Module):
    """An embedding, layers of an LSTM, and a dense layer, with dropout between them."""

    def __init__(self, config: dict[str, Any], vocabulary_size: int) -> None:
        super().__init__()
        sizes, rates = config["model"], config["regularization"]
        embedding, hidden, layers = (
            sizes[f"{x}"] for x in ("embedding_size", "hidden_size", "num_layers")
        )
        self.embedding = torch.nn.Embedding(vocabulary_size, embedding)
        self.lstm = torch.nn.LSTM(
            embedding, hidden, layers, batch_first=True, dropout=rates["hidden_dropout"]
        )
        self.dense = torch.nn.Linear(hidden, vocabulary_size)
        self.input_dropout = torch.nn.Dropout(rates["input_dropout"])
        self.output_dropout = torch.nn.Dropout(rates["output_dropout"])

    def forward(self, ids: torch.Tensor, carry: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        """Return the logits of windows [batch, time], and the last carry."""
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            hidden, carry = self.lstm(self.input_dropout(self.embedding(ids)), carry)
            return self.dense(self.output_dropout(hidden)).float(), carry


def read_windows(ids: np.ndarray, batch: int, window: int) -> Iterator[torch.Tensor]:
    """Yield one epoch of windows and the token after each, from as many places of the text."""
    length = (len(ids) - 1) // batch
    for first in range(0, length, window):
        last = min(first + window, length)
        rows = [ids[row * length + first : row * length + last + 1] for row in range(batch)]
        yield torch.from_numpy(np.stack(rows))


@torch.no_grad()
def measure_loss(model: Model, ids: np.ndarray, dtype: torch.dtype) -> float:
    """Return the mean loss of a text, whose carry is kept."""
    model.eval()
    total, carry = 0.0, None
    for windows in read_windows(ids, 1, 2048):
        logits, carry = model(windows[:, :-1], carry, dtype)
        loss = torch.nn.functional.cross_entropy(logits[0], windows[0, 1:], reduction="sum")
        total += loss.item()
    model.train()
    return total / (len(ids) - 1)


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ids = {name: array.astype(np.int64) for name, array in np.load(options.ids).items()}
    config = json.loads((options.run / "config.json").read_text())
    settings, (batch, window) = (
        config["optimizer"],
        map(config["batches"].get, ("batch_size", "window_length")),
    )
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = Model(config, 1 + max(int(array.max()) for array in ids.values()))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )

    def step(windows: torch.Tensor, carry: Any, dtype: torch.dtype) -> Any:
        optimizer.zero_grad()
        logits, carry = model(windows[:, :-1], carry, dtype)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_gradient_norm"])
        optimizer.step()
        return tuple(x.detach() for x in carry)

    initial = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        for windows, _ in zip(read_windows(ids["train"], batch, window), range(4), strict=False):
            start = time.monotonic()
            step(windows, None, dtype)
            seconds[dtype] = time.monotonic() - start
    dtype = min(seconds, key=seconds.__getitem__)
    model.load_state_dict(initial[0])
    optimizer.load_state_dict(initial[1])

    start = time.monotonic()
    measure_loss(model, ids["validation"], dtype)
    end = (
        START + 60 * options.minutes - 4 * (time.monotonic() - start)
    )  # For the last measurements.
    start, best, steps, validations = time.monotonic(), (np.inf, initial[0]), 0, 0
    while (now := time.monotonic()) < end:
        carry = None
        for windows in read_windows(
            np.roll(ids["train"], rng.integers(len(ids["train"]))), batch, window
        ):
            if (now := time.monotonic()) >= end:
                break
            spent = (now - start) / (end - start)
            if spent * VALIDATIONS > validations + 1:
                validations += 1
                best = min(best, validate(model, ids, dtype), key=lambda x: x[0])
            steps += 1
            rate = (
                settings["learning_rate"]
                * (1 - spent)
                * min(steps / max(settings["warmup_steps"], 1), 1)
            )
            optimizer.param_groups[0]["lr"] = rate
            carry = step(windows, carry, dtype)
    best = min(best, validate(model, ids, dtype), key=lambda x: x[0])
    model.load_state_dict(best[1])
    last = np.append(ids["validation"], ids["test"])
    parameters = sum(array.numel() for array in model.parameters())
    print(
        json.dumps(
            {
                "parameters": parameters,
                "loss": measure_loss(model, last, dtype),
                "validation": best[0],
                "steps": steps,
                "dtype": str(dtype),
            }
        )
    )


def validate(model: Model, ids: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[float, Any]:
    """Return the loss of the validation split, and the parameters."""
    return measure_loss(model, ids["validation"], dtype), copy.deepcopy(model.state_dict())


if __name__ == "__main__":
    main()
