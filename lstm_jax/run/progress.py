"""Keep pace with the devices, and show the progress of training."""

import sys
import time

import jax
from tqdm import tqdm

from lstm_jax.devices import hosts
from lstm_jax.train_step import TrainState

_SECONDS_BETWEEN_LINES = 10
# In jaxlib 0.10.2, all-reduces between the CPU devices of a process deadlock, and XLA aborts it,
# if a step is dispatched while 32 computations are in flight on one of the devices.
_MOST_STEPS_AHEAD = 16


class Pacer:
    """Waits for the devices about once a second.

    JAX dispatches steps asynchronously and may be tens of them ahead of the device. A stop has to
    wait for all of them. Between the waits, processes may be at different steps. So they agree on
    signals and on checkpoints only after one. If a process has several CPU devices, the waits are
    at most 16 steps apart.
    """

    def __init__(self, step: int) -> None:
        """Start when `step` steps are done; wait for the next one."""
        self._step, self._steps, self._clock = step, 1, time.monotonic()
        devices = jax.local_devices()
        shared = len(devices) > 1 and devices[0].platform == "cpu"
        self._most = _MOST_STEPS_AHEAD if shared else sys.maxsize

    def wait(self, step: int, state: TrainState) -> bool:
        """Wait if it is time to; return whether all processes are at this step now."""
        if step - self._step < self._steps:
            return jax.process_count() == 1
        jax.block_until_ready(state.loss_sum)
        milliseconds = hosts.max_over_processes(int(1e3 * (time.monotonic() - self._clock)))
        steps = int(self._steps / max(milliseconds, 1) * 1e3)
        self._steps = min(max(steps, 1), self._most)
        self._step, self._clock = step, time.monotonic()
        return True


class Progress:
    """Measures the speed of training; shows step, epoch, loss, speed and remaining time.

    On a terminal it is a bar on standard error, elsewhere a line on standard output every ten
    seconds. The first call, which compiles the step, is not measured.
    """

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int, shown: bool) -> None:
        self._first, self._total, self._steps_per_epoch = step, total_steps, steps_per_epoch
        self._shown = shown
        self._measured = ""  # The last training loss and speed.
        # (Steps done, time), from which the remaining time is measured.
        self._clock = self._start = step, time.monotonic()
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
        )

    def after_step(self, step: int) -> None:
        """Start the clock again after the first call."""
        if self._start[0] == self._first:
            self.start_clock(step)

    def start_clock(self, step: int) -> None:
        """Measure the speed from here on, with `step` steps done.

        The remaining time is estimated from the first call after a step, as that step compiles.
        """
        self._clock = step, time.monotonic()
        if self._start[0] == self._first:
            self._start = self._clock
        self._advance(step)

    def measure_speed(self, step: int) -> float:
        """Return the speed since the last call or `start_clock`; 0 if no step was done since."""
        before, self._clock = self._clock, (step, time.monotonic())
        steps, seconds = step - before[0], self._clock[1] - before[1]
        return steps / seconds if steps else 0.0

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done, with this training loss and speed (0 if unknown)."""
        self._measured = f", loss {loss:.3f}"
        if tokens_per_second:
            self._measured += f", {tokens_per_second:,.0f} tokens/s"
        left = self._advance(step)
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(", ".join(filter(None, [self._describe(step), left])), flush=True)

    def finish(self, step: int) -> None:
        """Show that the run ends at `step`, before all steps are done."""
        self._total = self._bar.total = step
        self._advance(step)

    def _describe(self, step: int) -> str:
        epoch = step / self._steps_per_epoch
        return f"step {step}/{self._total}, epoch {epoch:.2f}{self._measured}"

    def _advance(self, step: int) -> str:
        """Move the bar; return the remaining time, or "" before it can be estimated."""
        left = ""
        if steps := step - self._start[0]:
            seconds = (time.monotonic() - self._start[1]) / steps * (self._total - step)
            minutes, seconds = divmod(round(seconds), 60)
            left = f"{minutes}:{seconds:02} left"
        self._bar.set_description_str(self._describe(step), refresh=False)
        self._bar.set_postfix_str(left, refresh=False)
        self._bar.update(step - self._bar.n)
        return left

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        self._bar.close()
