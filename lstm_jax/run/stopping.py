"""Signals during training, and the pace at which it can stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import jax

from lstm_jax.devices import hosts


class Stopped(BaseException):
    """A signal asked training to stop; no `except Exception` on its way may keep it."""


class StopRequest:
    """Turns Ctrl-C (or SIGTERM) within its block into a request; more of them change nothing.

    Attributes:
      exit_code: None until a signal came, then what the command is to exit with.
    """

    exit_code: int | None = None
    _at_once = False

    def __enter__(self) -> "StopRequest":
        # Python gives signals to the main thread only, and lets only that set handlers.
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Stopped` if a signal came, to whichever process."""
        (code,) = hosts.get_greatest(self.exit_code or 0)
        if code:
            self.exit_code = code
            raise Stopped

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises `Stopped` wherever it comes.

        Not so where there are other processes, which are not to be left at different steps.
        """
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once:
                self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is None:
            self.exit_code = 128 + number
            if self._at_once:
                raise Stopped


class Pacer:
    """Waits for the device about once a second.

    JAX hands steps to the device and runs ahead, by tens of them. To stop, all that were handed
    over must be waited for.
    """

    def __init__(self, step: int) -> None:
        """Starts when `step` steps are done; the next one is waited for."""
        self._step, self._steps, self._clock = step, 1, time.monotonic()

    def keep(self, step: int, array: jax.Array) -> bool:
        """Waits for `array`, which step `step` computes, if it is time to.

        Returns:
          Whether processes may agree on something now: all do so at the same steps.
        """
        if step - self._step < self._steps:
            return jax.process_count() == 1
        jax.block_until_ready(array)
        (milliseconds,) = hosts.get_greatest(int(1e3 * (time.monotonic() - self._clock)))
        self._steps = max(1, int(self._steps / max(milliseconds, 1) * 1e3))
        self._step, self._clock = step, time.monotonic()
        return True
