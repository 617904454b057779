"""Keep pace with the devices, and show the progress of training."""

import sys
import time

import jax
from tqdm import tqdm

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
    """Measures the speed of training; shows step, epoch, loss, speed and remaining time.

    On a terminal it is a bar on standard error, elsewhere a line on standard output every ten
    seconds. The first call of the step, which compiles it, is not measured.
    """

    def __init__(self, plan: Plan, step: int, shown: bool) -> None:
        self._plan, self._shown, self._is_compiled = plan, shown, False
        # Steps done, and the time, from which the speed is measured.
        self._clock = step, time.monotonic()
        self._last_line = time.monotonic()
        is_bar = shown and sys.stderr.isatty()
        total = plan.total_steps
        self._bar = tqdm(
            total=total, initial=step, unit="step", dynamic_ncols=True, disable=not is_bar
        )

    def after_step(self, step: int) -> None:
        """Start the clock again after the first call."""
        if not self._is_compiled:
            self._is_compiled = True
            self.start_clock(step)

    def start_clock(self, step: int) -> None:
        """Measure the speed from here on, with `step` steps done."""
        self._clock = step, time.monotonic()
        self._bar.update(step - self._bar.n)

    def measure_speed(self, step: int) -> float:
        """Return the steps per second since the last call or `start_clock`; 0 without a step."""
        before, self._clock = self._clock, (step, time.monotonic())
        steps, seconds = step - before[0], self._clock[1] - before[1]
        return steps / seconds if steps else 0.0

    def show(self, step: int, loss: float, speed: float) -> None:
        """Show the training loss and the speed, in steps per second, or 0 if it is unknown."""
        plan = self._plan
        measured = [f"epoch {plan.count_epochs(step):.2f}", f"loss {loss:.3f}"]
        if speed:
            measured.append(f"{speed * plan.tokens_per_step:,.0f} tokens/s")
        self._bar.set_postfix_str(", ".join(measured), refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            if speed:
                minutes, seconds = divmod(round((plan.total_steps - step) / speed), 60)
                measured.append(f"{minutes}:{seconds:02} left")
            print(", ".join([f"step {step}/{plan.total_steps}", *measured]), flush=True)

    def finish(self, step: int) -> None:
        """Show that the run ends at `step`, before all steps are done."""
        self._bar.total = step
        self._bar.refresh()

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        self._bar.close()
