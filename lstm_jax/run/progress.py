"""What training prints: the setup, and the progress."""

import time
from collections.abc import Callable

import jax

from lstm_jax.run import messages
from lstm_jax.run.opening import OpenRun, Plan

_SECONDS_BETWEEN_LINES = 10
# Tokens of the window that is printed.
_LONGEST_WINDOW = 24


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
    return "\n".join(lines)


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
            minutes, seconds = divmod(round(left), 60)
            line += f", {speed:,.0f} tokens/s, {minutes}:{seconds:02} left"
        self._show(line)
