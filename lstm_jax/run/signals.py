"""Stop training on a signal, at the same step in all processes."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax

from lstm_jax.devices import hosts
from lstm_jax.run.loop import Loop, Observer

# In jaxlib 0.10.2, all-reduces between the CPU devices of a process deadlock, and XLA aborts it,
# if a step is dispatched while 32 computations are in flight on one of the devices.
_MOST_STEPS_AHEAD = 16


class Stopped(SystemExit):
    """A signal requested a stop. The argument is the exit code of the command.

    It is not an `Exception`, so that no `except Exception` catches it.
    """

    code: int


class StopRequest(Observer):
    """The first signal that `handle_signal` gets requests a stop; further ones change nothing."""

    _exit_code = 0  # Until a signal arrives.
    _at_once = False

    def handle_signal(self, number: int, unused: object) -> None:
        """Handle a signal: raise `Stopped` within `at_once`, otherwise at the next `check`."""
        if not self._exit_code:
            self._exit_code = 128 + number
            if self._at_once:
                raise Stopped(self._exit_code)

    def before_first_step(self, loop: Loop) -> None:
        """Check for a signal that arrived while the first validation finished."""
        self.after_step(loop)

    def after_step(self, loop: Loop) -> None:
        """Check for a signal, at steps that all processes have in common."""
        if loop.in_step or loop.step == loop.last_step:
            self.check()

    def check(self) -> None:
        """Raise `Stopped` if a signal arrived in any process; all call it at the same step."""
        if code := hosts.max_over_processes(self._exit_code):
            raise Stopped(code)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `Stopped` immediately, but not where several processes must agree."""
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once:
                self.check()
            yield
        finally:
            self._at_once = False


class Pacer(Observer):
    """Waits for the device about once a second, and sets `loop.in_step` at these steps.

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

    def after_step(self, loop: Loop) -> None:
        """Wait if it is time to, and set `loop.in_step`, which is the same in all processes."""
        waits = loop.step - self._step >= self._steps
        loop.in_step = waits or jax.process_count() == 1
        if not waits:
            return
        jax.block_until_ready(loop.state.loss_sum)
        milliseconds = hosts.max_over_processes(int(1e3 * (time.monotonic() - self._clock)))
        steps = int(self._steps / max(milliseconds, 1) * 1e3)
        self._steps = min(max(steps, 1), self._most)
        self._step, self._clock = loop.step, time.monotonic()
