"""What training prints: the setup, the progress, validations, and hints about settings."""

import time
from collections.abc import Callable
from datetime import timedelta

import jax
from flax.traverse_util import flatten_dict

from lstm_jax.errors import name_setting
from lstm_jax.run import messages
from lstm_jax.run.opening import OpenRun, Plan

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


def describe_setup(run: OpenRun, is_finished: bool) -> str:
    """Describe the model, the text with its first window, and what the run starts from."""
    config, vocabulary, model = run.config, run.vocabulary, run.model
    window = run.ids["train"][: min(config.batches.window_length, _LONGEST_WINDOW) + 1]
    inputs, targets = window[:-1], window[1:]
    counts = ", ".join(f"{len(of_split):,} {name}" for name, of_split in run.ids.items())
    device = run.mesh.devices.flat[0].device_kind
    lines = [
        f"{messages.format_parameters(run.first_state.params)}\n",
        f"{vocabulary.token_name}s: {counts}; vocabulary: {len(vocabulary)}; "
        f"steps per epoch: {run.plan.steps_per_epoch:,}; "
        f"matmuls in {model.dtype}, on {run.mesh.size} x {device}\n",
        "The first window and its targets:",
        f"  inputs  {vocabulary.decode(inputs)!r}",
        f"  targets {vocabulary.decode(targets)!r}",
        f"  inputs  {' '.join(map(str, inputs))}",
        f"  targets {' '.join(map(str, targets))}\n",
    ]
    if is_finished:
        lines.append(
            f"The run in {run.directory} is finished, at step {run.first_step}: to train longer, "
            "raise --config.num_epochs, --config.max_steps or --config.patience"
        )
        return "\n".join(lines)
    lines += run.notes
    if run.is_resumed:
        total = run.plan.total_steps
        lines.append(f"Resuming from step {run.first_step} of {total}, saved in {run.directory}")
    elif run.plan.total_steps < _FEW_STEPS and not (config.max_steps or config.init_from):
        lines.append(_suggest_steps(run))
    return "\n".join(lines)


def _suggest_steps(run: OpenRun) -> str:
    """Return a hint to start a run with more steps, and its flags."""
    windows = len(run.ids["train"]) // run.config.batches.window_length
    batch_size = min(run.config.batches.batch_size, max(windows // _STEPS_PER_EPOCH, 1))
    batch_size = 1 << batch_size.bit_length() - 1  # A power of two.
    epochs = -(-_STEPS // (windows // batch_size))
    sizes = [name_setting("batches.batch_size", batch_size), name_setting("num_epochs", epochs)]
    flags = " ".join(sizes + _suggest_dropout(run))
    return f"Hint: {run.plan.total_steps} steps are few: stop this run, and {_HINT.format(flags)}"


def _suggest_dropout(run: OpenRun) -> list[str]:
    """Return flags for more dropout, of the kinds that the model can have."""
    names = {path[-1] for path in flatten_dict(run.first_state.params)}
    can_have = {"hidden": run.model.num_layers > 1, "recurrent": "recurrent_kernel" in names}
    rates = {f"{kind}_dropout": x for kind, x in _DROPOUT.items() if can_have.get(kind, True)}
    return [
        name_setting(f"regularization.{name}", rate)
        for name, rate in rates.items()
        if rate > getattr(run.config.regularization, name)
    ]


def describe_validation(run: OpenRun, step: int, loss: float) -> str:
    """Return a line about the last validation, and a hint if the loss begins to rise."""
    plan, rows = run.plan, run.read_metrics()
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    best = min(losses, key=losses.__getitem__)
    described = messages.describe_loss(loss, run.vocabulary.token_name, run.sizes["validation"])
    done, total = map(plan.count_epochs, (step, plan.total_steps))
    line = f"epoch {done:.4g} of {total:.4g}: validation loss {described}"
    for row in [row for row in rows if row["split"] == "train"][-1:]:  # There may be none yet.
        line += (
            f"; best {losses[best]:.4f} at step {best}; training loss {row['loss']:.4f}, "
            f"learning rate {row['learning_rate']:.3g}"
        )
    # Two validations in a row, because one may be worse by chance.
    if [x > _RISE * losses[best] for x in losses.values()][-3:] == [False, True, True]:
        epochs = name_setting("num_epochs", max(round(plan.count_epochs(best)), 1))
        changes = " or ".join(filter(None, (" ".join(_suggest_dropout(run)), epochs)))
        line += (
            "\nHint: the validation loss rises (overfitting, if the training loss falls): "
            f"{_HINT.format(changes)}"
        )
    return line


class Progress:
    """Measures the speed of training, and prints step, epoch, loss, speed and remaining time.

    It prints a line every ten seconds.
    """

    def __init__(self, plan: Plan, show: Callable[[str], None]) -> None:
        self._plan, self._show = plan, show
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
        return (step - start) * self._plan.tokens_per_step / (now - since) if step > start else 0.0

    def print(self, step: int, loss: float, speed: float) -> None:
        """Print a line if it is time to; `speed` is in tokens per second, or 0."""
        now, plan = time.monotonic(), self._plan
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        line = (
            f"step {step}/{plan.total_steps}, epoch {plan.count_epochs(step):.2f}, loss {loss:.3f}"
        )
        if speed:
            left = (plan.total_steps - step) * plan.tokens_per_step / speed
            line += f", {speed:,.0f} tokens/s, {timedelta(seconds=round(left))} left"
        self._show(line)
