"""Format what commands print: texts, losses, and the setup and progress of training."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from lstm_jax import batches
from lstm_jax import loss as loss_lib
from lstm_jax.config import BatchesConfig
from lstm_jax.model import Params
from lstm_jax.run.workdir import Row
from lstm_jax.vocabulary import FILE_END, Ids, TextSize, Vocabulary

# Control characters, which a terminal executes, as escapes; bytes that are not UTF-8 as U+FFFD.
_PRINTABLE = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n\r"}
_PRINTABLE |= {**dict.fromkeys(range(0xD800, 0xE000), "\ufffd"), ord(FILE_END): "\n\n"}
_SECONDS_BETWEEN_LINES = 10
_LONGEST_WINDOW = 24  # Tokens of the window that is printed.


def make_printable(text: str) -> str:
    r"""Return a text that a terminal shows: \x1b is an escape, the end of a file a blank line."""
    return text.translate(_PRINTABLE)


def format_parameters(params: Params) -> str:
    """Return a table of the shapes and sizes of all parameters, with a sum for each layer."""
    rows: list[tuple[str, str, int]] = []
    for layer in sorted(
        params, key=lambda name: (name != "embedding", name == "dense", len(name), name)
    ):
        arrays = flatten_dict(params[layer], sep="/")
        rows.append((layer, "", sum(array.size for array in arrays.values())))
        rows += [(f"  {name}", str([*array.shape]), array.size) for name, array in arrays.items()]
    rows.append(("total", "", sum(array.size for array in jax.tree.leaves(params))))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {shape:>14}  {count:>12,}" for name, shape, count in rows)


def describe_loss(loss: float, vocabulary: Vocabulary, size: TextSize) -> str:
    """Return a loss in nats per token, in bits per character, and as a perplexity."""
    return (
        f"{loss:.4f} nats per {vocabulary.token_name}, "
        f"{loss_lib.compute_bits_per_character(loss, size):.4f} bits per character, "
        f"perplexity {loss_lib.compute_perplexity(loss):.3f}"
    )


def describe_setup(
    config: BatchesConfig, vocabulary: Vocabulary, ids: dict[str, Ids], dtype: str, mesh: Mesh
) -> str:
    """Describe the text with its first window, and the devices, with matmuls in `dtype`."""
    steps_per_epoch = batches.count_steps(len(ids["train"]), config)
    window = ids["train"][: min(config.window_length, _LONGEST_WINDOW) + 1]
    inputs, targets = window[:-1], window[1:]
    counts = ", ".join(f"{len(of_split):,} {name}" for name, of_split in ids.items())
    return (
        f"{vocabulary.token_name}s: {counts}; vocabulary: {len(vocabulary)}; "
        f"steps per epoch: {steps_per_epoch:,}; "
        f"matmuls in {dtype}, on {mesh.size} x {mesh.devices.flat[0].device_kind}\n\n"
        "The first window and its targets:\n"
        f"  inputs  {vocabulary.decode(inputs)!r}\n"
        f"  targets {vocabulary.decode(targets)!r}\n"
        f"  inputs  {' '.join(map(str, inputs))}\n"
        f"  targets {' '.join(map(str, targets))}\n"
    )


def describe_validation(rows: Sequence[Row], epochs: float, loss_text: str) -> str:
    """Return a line about the last validation in a training of a number of epochs.

    `loss_text` is its loss, as `describe_loss` returns it. Where the loss begins to rise, another
    line says what to change.
    """
    validations = [row for row in rows if row["split"] == "validation"]
    best = min(validations, key=lambda row: row["loss"])
    line = f"epoch {validations[-1]['epoch']:.4g} of {epochs:.4g}: validation loss {loss_text}"
    if train := [row for row in rows if row["split"] == "train"]:
        line += (
            f"; best {best['loss']:.4f} at step {best['step']}; training loss "
            f"{train[-1]['loss']:.4f}, learning rate {train[-1]['learning_rate']:.3g}"
        )
    # Two validations in a row, because one may be worse by chance.
    if [row["loss"] > 1.01 * best["loss"] for row in validations[-3:]] == [False, True, True]:
        line += (
            "\nThe validation loss rises: start again with more dropout, such as "
            "--config.regularization.output_dropout=0.5, or with "
            f"--config.num_epochs={max(round(best['epoch']), 1)} (docs/choosing.md)"
        )
    return line


class Progress:
    """Measures the speed of training, and prints a line about it every ten seconds."""

    def __init__(self, total_steps: int, tokens_per_step: int, show: Callable[[str], None]) -> None:
        self._total_steps, self._tokens_per_step = total_steps, tokens_per_step
        self._show = show
        self._clock: tuple[int, float] | None = None  # Step and time of the start of a measurement.
        self._last_line = time.monotonic()

    def after_step(self, step: int, result: jax.Array) -> None:
        """Start the clock, if it does not run, when the `result` of a step is computed.

        So the first step, which compiles, is not measured.
        """
        if not self._clock:
            jax.block_until_ready(result)
            self._clock = step, time.monotonic()

    def stop_clock(self) -> None:
        """Measure the speed from the next step on."""
        self._clock = None

    def report(self, step: int, epoch: float, loss: float) -> float:
        """Print a line if it is time to.

        Return the tokens per second since the last call, or the start; 0 if it is unknown.
        """
        now = time.monotonic()
        (start, since), self._clock = self._clock or (step, now), (step, now)
        speed = (step - start) * self._tokens_per_step / (now - since) if step > start else 0.0
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            line = f"step {step}/{self._total_steps}, epoch {epoch:.2f}, loss {loss:.3f}"
            if speed:
                left = (self._total_steps - step) * self._tokens_per_step / speed
                line += f", {speed:,.0f} tokens/s, {timedelta(seconds=round(left))} left"
            self._show(line)
        return speed
