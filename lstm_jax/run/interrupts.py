"""Let Ctrl-C and SIGTERM stop training when everything is saved."""

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn


class Stopped(KeyboardInterrupt):
    """A signal has stopped training, with everything saved: the same call resumes."""

    def __init__(self, code: int) -> None:
        """Set the exit code of the command: 130 after Ctrl-C, 143 after SIGTERM."""
        super().__init__(f"training was stopped and is saved: it can be resumed (exit code {code})")
        self.code = code


class StopRequest(contextlib.ExitStack[None]):
    """Within its block, the first Ctrl-C or SIGTERM sets `code`, the exit code that it requests.

    A second one is handled as before the block: a command ends at once.
    """

    code = 0

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers. Ignored signals, as SIGINT in background jobs of a
        # shell, stay ignored; handlers of native code, which are None, can't be restored.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    signal.signal(number, self._handle)
                    self.callback(signal.signal, number, handler)
        return self

    def _handle(self, number: int, unused: object) -> None:
        self.code = 128 + number
        self.close()


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads of libraries.

    After an interrupt they may never end, or still compute on arrays that Python would free.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
