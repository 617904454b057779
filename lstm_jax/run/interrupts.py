"""Handle Ctrl-C and SIGTERM: training saves and stops; any other program ends at once.

Python would raise KeyboardInterrupt wherever the program is at that time. That may be in an import,
which can't be repeated, or in a callback from which no exception propagates. So the process ends at
once, as a killed one does: files get their names when they are complete.
"""

import contextlib
import os
import signal
import sys
import threading
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal has stopped training, with everything saved: the same call resumes."""

    def __init__(self, code: int) -> None:
        """Set the exit code of the command: 130 after Ctrl-C, 143 after SIGTERM."""
        super().__init__(f"training was stopped and is saved: it can be resumed (exit code {code})")
        self.code = code


class StopRequest(contextlib.AbstractContextManager["StopRequest", None]):
    """Within its block, the first Ctrl-C or SIGTERM sets `code`, the exit code that it requests.

    A second one is handled as before the block: a command ends at once.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers. Ignored signals, as SIGINT in background jobs of a
        # shell, stay ignored; handlers of native code, which are None, can't be restored.
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            for number, handler in handlers.items():
                if handler not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, unused: object) -> None:
        self.code = 128 + number
        self.__exit__()

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def exit_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process immediately; call it before anything is written."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


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
