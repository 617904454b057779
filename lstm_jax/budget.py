"""Choose the fields that a config with `minutes` leaves open, for its text and this machine.

The model is the largest that reads three tokens for each weight in the time, or a short text 64
times. The batch depends on the length of the text, the learning rate on batch and hidden size, and
dropout on the epochs and the weights for each token of the text. The numbers were fitted to 38 runs
of half a minute to five minutes on texts of 20 KB to 26 MB; `benchmarks/budget.py` compares the
result with a search.
"""

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config, complete_config, flatten
from lstm_jax.data import texts
from lstm_jax.devices import mesh as mesh_lib
from lstm_jax.devices import processes
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.train_step import init_state, make_train_step
from lstm_jax.vocabulary import Ids, Vocabulary

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
OPENABLE = (  # The fields that can be left open.
    "data.units",
    "data.fractions",
    "batches.batch_size",
    "model.embedding_size",
    "model.hidden_size",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    *(f"regularization.{kind}_dropout" for kind in _DROPOUT),
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
_BATCHES, _STEPS_PER_EPOCH = (16, 32, 64), 100
_LEARNING_RATE = 0.015  # With `_FIRST_SIZE` hidden units and the largest batch.
_EPOCHS = 64  # A model that reads a short text so often may be larger than others.
# AdamW's weights are a mean of the last 1 / (learning rate * decay) updates, which should be those
# of one or two epochs (Wang & Aitchison 2024), but of more for a short text, which has dropout.
_EPOCHS_OF_UPDATES, _LARGEST_DECAY = 1.3, 0.15
_SHARE = 0.97  # Of the time that is left; the speed may fall.
_SHARE_OF_MEASURING = 0.004  # Of the minutes, for each size that is measured.
_SECONDS_OF_EVALUATION = 4.0  # To compile it, generation, and to write the last files.
_EVALUATION = 2.5  # Tokens that are evaluated in the time of one in training.
_VALIDATIONS, _SHARE_OF_VALIDATIONS = 8, 0.1  # At most, in this share of the time.


class Speed(NamedTuple):
    """Measurements of a config on this machine; all processes of a run have the same."""

    step_seconds: float
    compile_seconds: float
    seconds_left: int  # Of the minutes, after measuring.


def choose_tokens(config: Config, directory: Path) -> Config:
    """Choose the open fields of the text; of a run that resumes, take all from it.

    Raise `UserError` if something takes time that `choose_fields` does not know.
    """
    if workdir.has_run(directory):
        fields = dict(flatten(workdir.load_config(directory)))
        return complete_config(config, {name: fields[name] for name in config.open})
    if config.init_from or config.distill.teachers:
        raise UserError(
            "config.minutes chooses the sizes of a new model, without teachers: leave out "
            "--init_from and --config.distill.teachers, or set the sizes in another config"
        )
    return _fill(config, texts.choose_tokens_and_splits(config.data))


def choose_fields(
    config: Config, vocabulary: Vocabulary, ids: Mapping[str, Ids], deadline: float
) -> tuple[Config, str]:
    """Choose all open fields, and return the config with a line that says what was chosen and why.

    `ids` are those of train, validation and test, and `deadline` is a time of `time.monotonic`.
    """
    length, validation, test = map(len, ids.values())
    window = config.batches.window_length
    suitable = [n for n in _BATCHES if n * window * _STEPS_PER_EPOCH <= length]
    config = _fill(config, {"batches.batch_size": max(suitable, default=_BATCHES[0])})
    batch_size, tokens_per_step = config.batches.batch_size, config.batches.batch_size * window

    sizes = _SIZES if "model.hidden_size" in config.open else (config.model.hidden_size,)
    speeds: dict[tuple[int, bool], Speed] = {}

    def count_weights(size: int) -> int:
        """Return the weights of the kernels of LSTM layers, whatever the cell."""
        return 8 * config.model.num_layers * size**2

    def measure_repetition(size: int, tokens: float) -> float:
        return tokens / length * count_weights(size) / length

    def set_size(size: int, tokens: float) -> Config:
        values: dict[str, Any] = {"model.hidden_size": size}
        values["model.embedding_size"] = min(size, _LARGEST_EMBEDDING)
        position = np.log(max(measure_repetition(size, tokens), 1))
        for kind, rates in _DROPOUT.items():
            applies = kind != "hidden" or config.model.num_layers > 1  # It is between layers.
            rate = float(np.interp(position, np.log(_REPETITION), rates)) if applies else 0.0
            values[f"regularization.{kind}_dropout"] = round(rate, 2)
        return _fill(config, values)

    def predict(size: int) -> float:
        """Return the tokens that a model of this size reads in the time."""
        last = next(reversed(speeds.values()))
        # Of the nearest size, and with dropout, if that was measured.
        near = min(speeds, key=lambda x: (abs(math.log(x[0] / size)), not x[1]))
        speed, ratio = speeds[near], size / near[0]
        rate = tokens_per_step / (speed.step_seconds * ratio**_GROWTH)
        left = _SHARE * last.seconds_left - speed.compile_seconds - _SECONDS_OF_EVALUATION
        tokens = left * rate
        evaluation_tokens = validation + test + count_validations(tokens) * validation
        return max(tokens - evaluation_tokens / _EVALUATION, 0.0)

    def count_validations(tokens: float) -> int:
        most = _SHARE_OF_VALIDATIONS * tokens * _EVALUATION / validation
        return min(max(int(most), 1), _VALIDATIONS)

    def has_enough(size: int) -> bool:
        return predict(size) >= min(_TOKENS_PER_WEIGHT * count_weights(size), _EPOCHS * length)

    size, tokens = _FIRST_SIZE if _FIRST_SIZE in sizes else sizes[0], _FIRST_TOKENS
    while (key := (size, measure_repetition(size, tokens) > _REPETITION[0])) not in speeds:
        # Dropout takes time.
        speeds[key] = measure_speed(set_size(size, tokens), vocabulary, ids["train"], deadline)
        size = max(filter(has_enough, sizes), default=sizes[0])
        tokens = predict(size)
    steps = config.max_steps or max(int(tokens / tokens_per_step), 1)
    tokens = steps * tokens_per_step
    config = set_size(size, tokens)
    rate = _LEARNING_RATE * math.sqrt(_FIRST_SIZE / size * batch_size / _BATCHES[-1])
    config = _fill(config, {"optimizer.learning_rate": float(f"{rate:.2g}")})
    decay = tokens_per_step / (_EPOCHS_OF_UPDATES * length * config.optimizer.learning_rate)
    config = _fill(
        config,
        {
            "optimizer.warmup_steps": min(50, steps // 10),
            "optimizer.weight_decay": float(f"{min(decay, _LARGEST_DECAY):.2g}"),
            "num_epochs": math.ceil(tokens / length),
            "max_steps": steps,
            "validate_every_steps": math.ceil(steps / count_validations(tokens)),
            "log_every_steps": max(min(steps // 20, 50), 1),
        },
    )
    epochs = float(f"{tokens / length:.3g}")
    rates = {kind: getattr(config.regularization, f"{kind}_dropout") for kind in _DROPOUT}
    dropout = ", ".join(f"{kind} {rate:.2g}" for kind, rate in rates.items() if rate)
    line = (
        f"For {config.minutes:g} min: {config.model.num_layers} x {size} hidden units, with "
        f"{1000 * speeds[key].step_seconds:.0f} ms for a step of {batch_size} x {window} tokens; "
        f"steps: {steps:,}, or {epochs:,g} epochs; learning rate: "
        f"{config.optimizer.learning_rate:.2g}; dropout: {dropout or 'none'}"
    )
    return config, line


def measure_speed(config: Config, vocabulary: Vocabulary, ids: Ids, deadline: float) -> Speed:
    """Measure a training step, for a second or a small share of the time.

    All processes return the numbers of the slowest, so that they choose the same.
    """
    mesh = mesh_lib.make_mesh(config)
    model = model_lib.make_model(config.model, len(vocabulary), vocabulary.stop_id)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 1)
    state = init_state(model, optimizer, config).place(mesh)
    train_step = make_train_step(model, optimizer, config, mesh)
    feed = mesh_lib.feed_batches(ids, config, mesh)
    times, seconds = list[float](), max(1.0, _SHARE_OF_MEASURING * 60 * config.minutes)
    while len(times) < 4 or sum(times[2:]) < seconds:
        start = time.monotonic()
        state = train_step(state, next(feed))
        jax.block_until_ready(state.loss_sum)
        times.append(processes.max_over_processes(int(1e6 * (time.monotonic() - start))) / 1e6)
    left = -processes.max_over_processes(-int(deadline - time.monotonic()))
    return Speed(statistics.median(times[2:]), times[0], left)


def _fill(config: Config, values: Mapping[str, Any]) -> Config:
    """Set those fields that are open."""
    return complete_config(config, {x: y for x, y in values.items() if x in config.open})
