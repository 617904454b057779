"""Stop training on a signal, at the same step in all processes."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Self

import jax

from lstm_jax.devices import hosts


class Stopped(BaseException):
    """A signal requested a stop; a BaseException, so that no `except Exception` catches it."""


class StopRequest:
    """Within its block, Ctrl-C or SIGTERM requests a stop; further signals change nothing."""

    exit_code: int | None = None  # Of the command; None until a signal arrives.
    _at_once = False

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread, and only that may set handlers.
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        # Not those that are ignored, or that native code handles, which Python can't restore.
        kept = (signal.SIG_IGN, None)
        self._before = {
            number: signal.signal(number, self._note)
            for number in numbers
            if signal.getsignal(number) not in kept
        }
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal arrived in any process."""
        if code := hosts.max_over_processes(self.exit_code or 0):
            self.exit_code = code
            raise Stopped

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

    def _note(self, number: int, unused: object) -> None:
        if self.exit_code is None:
            self.exit_code = 128 + number
            if self._at_once:
                raise Stopped


class Pacer:
    """Waits for the device about once a second.

    JAX dispatches steps asynchronously and may be tens of them ahead of the device. A stop has to
    wait for all of them.
    """

    def __init__(self, step: int) -> None:
        """Start when `step` steps are done; wait for the next one."""
        self._step, self._steps, self._clock = step, 1, time.monotonic()

    def keep(self, step: int, array: jax.Array) -> bool:
        """Wait for `array`, a result of step `step`, if it is time to.

        Return whether processes may communicate now: all of them get True at the same steps.
        """
        if step - self._step < self._steps:
            return jax.process_count() == 1
        jax.block_until_ready(array)
        milliseconds = hosts.max_over_processes(int(1e3 * (time.monotonic() - self._clock)))
        self._steps = max(1, int(self._steps / max(milliseconds, 1) * 1e3))
        self._step, self._clock = step, time.monotonic()
        return True
