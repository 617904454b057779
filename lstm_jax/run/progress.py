"""What training prints: the setup, the progress, validations, and hints about settings."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from lstm_jax.config import BatchesConfig, RegularizationConfig
from lstm_jax.errors import name_setting
from lstm_jax.model import Params
from lstm_jax.run import messages
from lstm_jax.run.metrics import Row
from lstm_jax.vocabulary import Ids, Vocabulary

_SECONDS_BETWEEN_LINES = 10
# Tokens of the window that is printed.
_LONGEST_WINDOW = 24
# With fewer steps, a model has hardly learned to spell.
_FEW_STEPS = 300
# What hints suggest for a short text (docs/choosing.md): steps, steps in an epoch, dropout.
_STEPS, _STEPS_PER_EPOCH = 1000, 40
_DROPOUT = {"input": 0.2, "hidden": 0.3, "output": 0.5, "recurrent": 0.3}
_HINT = "try the same command with another --workdir and {} (docs/choosing.md)"
# A validation loss is worse than the best one if it is higher by this factor.
_RISE = 1.01


def describe_setup(
    vocabulary: Vocabulary,
    params: Params,
    ids: dict[str, Ids],
    batches: BatchesConfig,
    steps_per_epoch: int,
    dtype: str,
    mesh: Mesh,
) -> str:
    """Describe the model, the text with its first window, and the devices."""
    window = ids["train"][: min(batches.window_length, _LONGEST_WINDOW) + 1]
    inputs, targets = window[:-1], window[1:]
    counts = ", ".join(f"{len(of_split):,} {name}" for name, of_split in ids.items())
    lines = [
        f"{messages.format_parameters(params)}\n",
        f"{vocabulary.token_name}s: {counts}; vocabulary: {len(vocabulary)}; "
        f"steps per epoch: {steps_per_epoch:,}; "
        f"matmuls in {dtype}, on {mesh.size} x {mesh.devices.flat[0].device_kind}\n",
        "The first window and its targets:",
        f"  inputs  {vocabulary.decode(inputs)!r}",
        f"  targets {vocabulary.decode(targets)!r}",
        f"  inputs  {' '.join(map(str, inputs))}",
        f"  targets {' '.join(map(str, targets))}\n",
    ]
    return "\n".join(lines)


def suggest_steps(batches: BatchesConfig, length: int, total_steps: int, dropout: str) -> list[str]:
    """Return a hint to start a run with more steps, and its flags; [] if there are enough.

    `length` is the number of training tokens, and `dropout` from `suggest_dropout`.
    """
    if total_steps >= _FEW_STEPS:
        return []
    windows = length // batches.window_length
    batch_size = min(batches.batch_size, max(windows // _STEPS_PER_EPOCH, 1))
    batch_size = 1 << batch_size.bit_length() - 1  # A power of two.
    epochs = -(-_STEPS // (windows // batch_size))
    sizes = [name_setting("batches.batch_size", batch_size), name_setting("num_epochs", epochs)]
    flags = " ".join(filter(None, [*sizes, dropout]))
    return [f"Hint: {total_steps} steps are few: stop this run, and {_HINT.format(flags)}"]


def suggest_dropout(rates: RegularizationConfig, num_layers: int, params: Params) -> str:
    """Return flags for more dropout, of the kinds that the model can have."""
    names = {path[-1] for path in flatten_dict(params)}
    can_have = {"hidden": num_layers > 1, "recurrent": "recurrent_kernel" in names}
    wanted = {f"{kind}_dropout": x for kind, x in _DROPOUT.items() if can_have.get(kind, True)}
    return " ".join(
        name_setting(f"regularization.{name}", rate)
        for name, rate in wanted.items()
        if rate > getattr(rates, name)
    )


def describe_validation(
    rows: Sequence[Row], steps_per_epoch: int, total_steps: int, described: str, dropout: str
) -> str:
    """Return a line about the last validation, and a hint if the loss begins to rise.

    `described` is its loss, and `dropout` from `suggest_dropout`.
    """
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    *_, step = losses
    best = min(losses, key=losses.__getitem__)
    done, total = step / steps_per_epoch, total_steps / steps_per_epoch
    line = f"epoch {done:.4g} of {total:.4g}: validation loss {described}"
    for row in [row for row in rows if row["split"] == "train"][-1:]:  # There may be none yet.
        line += (
            f"; best {losses[best]:.4f} at step {best}; training loss {row['loss']:.4f}, "
            f"learning rate {row['learning_rate']:.3g}"
        )
    # Two validations in a row, because one may be worse by chance.
    if [x > _RISE * losses[best] for x in losses.values()][-3:] == [False, True, True]:
        epochs = name_setting("num_epochs", max(round(best / steps_per_epoch), 1))
        changes = " or ".join(filter(None, (dropout, epochs)))
        line += (
            "\nHint: the validation loss rises (overfitting, if the training loss falls): "
            f"{_HINT.format(changes)}"
        )
    return line


class Progress:
    """Measures the speed of training, and prints step, epoch, loss, speed and remaining time.

    It prints a line every ten seconds.
    """

    def __init__(
        self, total_steps: int, batches: BatchesConfig, show: Callable[[str], None]
    ) -> None:
        self._total_steps, self._show = total_steps, show
        self._tokens_per_step = batches.batch_size * batches.window_length
        self._clock: tuple[int, float] | None = None  # Step and time of the start of a measurement.
        self._last_line = time.monotonic()

    def after_step(self, step: int, result: jax.Array) -> None:
        """Start the clock, if it does not run, when the `result` of the step is computed."""
        if not self._clock:
            jax.block_until_ready(result)
            self._clock = step, time.monotonic()

    def stop_clock(self) -> None:
        """Measure the speed from the next step on."""
        self._clock = None

    def measure_speed(self, step: int) -> float:
        """Return the tokens per second since the last call or the start; 0 if it is unknown."""
        now = time.monotonic()
        (start, since), self._clock = self._clock or (step, now), (step, now)
        return (step - start) * self._tokens_per_step / (now - since) if step > start else 0.0

    def print(self, step: int, epoch: float, loss: float, speed: float) -> None:
        """Print a line if it is time to; `speed` is in tokens per second, or 0."""
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        line = f"step {step}/{self._total_steps}, epoch {epoch:.2f}, loss {loss:.3f}"
        if speed:
            left = (self._total_steps - step) * self._tokens_per_step / speed
            line += f", {speed:,.0f} tokens/s, {timedelta(seconds=round(left))} left"
        self._show(line)
