"""Handle Ctrl-C and SIGTERM at any time of a command: print one line, exit with code 130 or 143.

Python would raise KeyboardInterrupt wherever the program is at that time. That may be in an import,
which can't be repeated, or in a callback from which no exception propagates. So the process ends at
once, as a killed one does: files get their names when they are complete. Training requests a stop.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal has stopped training, with everything saved: the same call resumes."""

    def __init__(self, code: int) -> None:
        """Set the exit code of the command: 130 after Ctrl-C, 143 after SIGTERM."""
        super().__init__(f"training was stopped and is saved: it can be resumed (exit code {code})")
        self.code = code


class StopRequest:
    """The first signal that `handle_signal` gets requests a stop; further ones change nothing."""

    code = 0  # The exit code, after a signal.
    _at_once = False

    def handle_signal(self, number: int, unused: object) -> None:
        """Handle a signal: raise `Stopped` within `at_once`, otherwise at the next `check`."""
        if not self.code:
            self.code = 128 + number
            if self._at_once:
                raise Stopped(self.code)

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self.code:
            raise Stopped(self.code)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `Stopped` immediately."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False


def exit_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process immediately; call it before anything is written."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


@contextlib.contextmanager
def handle_signals(handler: Callable[..., object]) -> Iterator[None]:
    """Call a handler for Ctrl-C and SIGTERM within the block, in the main thread.

    Those that are ignored, as SIGINT in background jobs of a shell, stay ignored.
    """
    # Python delivers signals to the main thread, and only that may set handlers. It can't restore
    # a handler of native code, which is None.
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS if in_main}
    changed = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)


def _leave(number: int, *unused: object) -> NoReturn:
    """End the process with one line and the exit code of a signal."""
    os.write(2, b"Interrupted.\n" if number == signal.SIGINT else b"Terminated.\n")
    exit_now(128 + number)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads of libraries.

    After an interrupt they may never end, or still compute on arrays that Python would free.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
