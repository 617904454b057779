"""Keep pace with the devices, and print the progress of training."""

import sys
import time

import jax

from lstm_jax.devices import hosts
from lstm_jax.run.opening import Plan
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
    """Measures the speed of training, and prints step, epoch, loss, speed and remaining time.

    It prints a line every ten seconds. The first call of the step, which compiles it, is not
    measured.
    """

    def __init__(self, plan: Plan, prints: bool) -> None:
        self._plan, self._prints = plan, prints
        self._clock: tuple[int, float] | None = None  # Step and time of the start of a measurement.
        self._last_line = time.monotonic()

    def after_step(self, step: int) -> None:
        """Start the clock after the first call, or after `stop_clock`."""
        self._clock = self._clock or (step, time.monotonic())

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
        if not self._prints or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        line = (
            f"step {step}/{plan.total_steps}, epoch {plan.count_epochs(step):.2f}, loss {loss:.3f}"
        )
        if speed:
            left = (plan.total_steps - step) * plan.tokens_per_step / speed
            minutes, seconds = divmod(round(left), 60)
            line += f", {speed:,.0f} tokens/s, {minutes}:{seconds:02} left"
        print(line, flush=True)
