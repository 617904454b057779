"""Choose the fields that a config with `minutes` leaves open, for its text and this machine.

The model is the largest that reads enough tokens for its weights in the time, or a short text often
enough. The batch depends on the length of the text, the learning rate on both, and dropout on the
epochs and the weights for each token of the text. The numbers were fitted to 38 runs of half a
minute to five minutes on texts of 20 KB to 26 MB; `benchmarks/budget.py` compares the result with a
search.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lstm_jax.config import Config, complete_config

# The fields that can be left open.
FIELDS = (
    "data.units",
    "data.fractions",
    "batches.batch_size",
    "model.embedding_size",
    "model.hidden_size",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "regularization.embedding_dropout",
    "regularization.input_dropout",
    "regularization.hidden_dropout",
    "regularization.output_dropout",
    "regularization.recurrent_dropout",
    "num_epochs",
    "max_steps",
    "validate_every_steps",
    "log_every_steps",
)
_SIZES = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
_FIRST_SIZE, _FIRST_TOKENS = 256, 1e6  # Measured first, with dropout for this number of tokens.
_LARGEST_EMBEDDING = 256
_TOKENS_PER_WEIGHT = 3  # A larger model reads too few in the time.
_GROWTH = 1.65  # The time of a step grows as this power of the hidden size.
_SMALLEST_BATCH, _LARGEST_BATCH, _STEPS_PER_EPOCH = 16, 64, 100
# Each kind of dropout at these numbers of epochs times weights for each token of the text; in
# between, by their logarithm.
_REPETITION = (10, 100, 300, 3000, 20000)
_DROPOUT = {
    "embedding": (0.0, 0.05, 0.05, 0.1, 0.2),
    "input": (0.0, 0.05, 0.15, 0.3, 0.4),
    "hidden": (0.0, 0.25, 0.3, 0.4, 0.5),
    "output": (0.0, 0.3, 0.45, 0.6, 0.7),
    "recurrent": (0.0, 0.1, 0.25, 0.5, 0.6),
}
_EPOCHS = 64  # A model that reads a short text so often may be larger than others.
_SHARE = 0.97  # Of the time that is left; the speed may fall.
_SECONDS_OF_EVALUATION = 4.0  # To compile it, generation, and to write the last files.
_EVALUATION = 2.5  # Tokens that are evaluated in the time of one in training.
_VALIDATIONS, _SHARE_OF_VALIDATIONS = 8, 0.1  # At most, in this share of the time.


class Speed(NamedTuple):
    """Measurements of a config on this machine; all processes of a run have the same."""

    step_seconds: float
    compile_seconds: float
    seconds_left: int  # Of the minutes, after measuring.


def choose_fields(
    config: Config, lengths: Mapping[str, int], measure: Callable[[Config], Speed]
) -> tuple[Config, str]:
    """Choose all open fields, and return the config with a line that says what was chosen and why.

    Args:
      config: a config with open fields (`Config.open`).
      lengths: the number of tokens of each split.
      measure: returns the speed of a config.
    """
    length, window = lengths["train"], config.batches.window_length
    batch_size = 2 ** int(math.log2(max(length / window / _STEPS_PER_EPOCH, 1)))
    batch_size = min(max(batch_size, _SMALLEST_BATCH), _LARGEST_BATCH)
    config = fill(config, {"batches.batch_size": batch_size})
    batch_size, tokens_per_step = config.batches.batch_size, config.batches.batch_size * window

    sizes = _SIZES if "model.hidden_size" in config.open else (config.model.hidden_size,)
    speeds: dict[tuple[int, bool], Speed] = {}

    def count_weights(size: int) -> int:
        """Return the weights of the kernels of LSTM layers, whatever the cell."""
        return 8 * config.model.num_layers * size**2

    def measure_repetition(size: int, tokens: float) -> float:
        return tokens / length * count_weights(size) / length

    def set_size(size: int, tokens: float) -> Config:
        chosen: dict[str, Any] = {"model.hidden_size": size}
        chosen["model.embedding_size"] = min(size, _LARGEST_EMBEDDING)
        position = np.log(max(measure_repetition(size, tokens), 1))
        for kind, rates in _DROPOUT.items():
            applies = kind != "hidden" or config.model.num_layers > 1  # It is between layers.
            rate = float(np.interp(position, np.log(_REPETITION), rates)) if applies else 0.0
            chosen[f"regularization.{kind}_dropout"] = round(rate, 2)
        return fill(config, chosen)

    def predict(size: int) -> float:
        """Return the tokens that a model of this size reads in the time."""
        last = next(reversed(speeds.values()))
        # Of the nearest size, and with dropout, if that was measured.
        near = min(speeds, key=lambda x: (abs(math.log(x[0] / size)), not x[1]))
        speed, ratio = speeds[near], size / near[0]
        rate = tokens_per_step / (speed.step_seconds * ratio**_GROWTH)
        left = _SHARE * last.seconds_left - speed.compile_seconds - _SECONDS_OF_EVALUATION
        tokens, once = left * rate, lengths["validation"] + lengths["test"]
        evaluated = once + count_validations(tokens) * lengths["validation"]
        return max(tokens - evaluated / _EVALUATION, 0.0)

    def count_validations(tokens: float) -> int:
        most = _SHARE_OF_VALIDATIONS * tokens * _EVALUATION / lengths["validation"]
        return min(max(int(most), 1), _VALIDATIONS)

    def has_enough(size: int) -> bool:
        return predict(size) >= min(_TOKENS_PER_WEIGHT * count_weights(size), _EPOCHS * length)

    size, tokens = _FIRST_SIZE if _FIRST_SIZE in sizes else sizes[0], _FIRST_TOKENS
    while (key := (size, measure_repetition(size, tokens) > _REPETITION[0])) not in speeds:
        speeds[key] = measure(set_size(size, tokens))  # Dropout takes time.
        size = max(filter(has_enough, sizes), default=sizes[0])
        tokens = predict(size)
    steps = config.max_steps or max(int(tokens / tokens_per_step), 1)
    tokens = steps * tokens_per_step
    config = set_size(size, tokens)
    rate = 0.015 * math.sqrt(_FIRST_SIZE / size * batch_size / _LARGEST_BATCH)
    config = fill(
        config,
        {
            "optimizer.learning_rate": float(f"{rate:.2g}"),
            "optimizer.warmup_steps": min(50, steps // 10),
            "optimizer.weight_decay": 0.15,
            "num_epochs": math.ceil(tokens / length),
            "max_steps": steps,
            "validate_every_steps": math.ceil(steps / count_validations(tokens)),
            "log_every_steps": max(min(steps // 20, 50), 1),
        },
    )
    epochs = float(f"{tokens / length:.3g}")
    rates = dataclasses.asdict(config.regularization)
    dropout = ", ".join(
        f"{kind.removesuffix('_dropout')} {x:.2g}" for kind, x in rates.items() if x
    )
    line = (
        f"For {config.minutes:g} min: {config.model.num_layers} x {size} hidden units, with "
        f"{1000 * speeds[key].step_seconds:.0f} ms for a step of {batch_size} x {window} tokens; "
        f"steps: {steps:,}, or {epochs:,g} epochs; learning rate: "
        f"{config.optimizer.learning_rate:.2g}; dropout: {dropout or 'none'}"
    )
    return config, line


def fill(config: Config, values: Mapping[str, Any]) -> Config:
    """Set those fields that are open."""
    return complete_config(config, {x: y for x, y in values.items() if x in config.open})
