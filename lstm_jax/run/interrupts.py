"""Handle Ctrl-C and SIGTERM at any time of a command: print one line, exit with code 130 or 143.

Python raises KeyboardInterrupt wherever the program is at that time. That may be in an import, or
in a callback from which no exception propagates, so that it is lost.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

# An interrupt that had no effect for this time was lost, and is raised again.
_AGAIN_SECONDS = 5

_pending = False


def exit_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process immediately; call it before anything is written.

    If one is ignored, as SIGINT in background jobs of a shell, it stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, leave)


def raise_from_here() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, repeatedly until `answer` is called."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGALRM, _raise)
        signal.signal(signal.SIGINT, _raise)


def answer() -> None:
    """Record that an interrupt was handled and the program continues."""
    global _pending
    _pending = False
    signal.setitimer(signal.ITIMER_REAL, 0)


def end() -> bool:
    """Ignore Ctrl-C from here on; return whether an interrupt is not handled yet."""
    if signal.getsignal(signal.SIGINT) is _raise:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    pending = _pending
    answer()
    return pending


def leave(number: int = signal.SIGINT, *unused: object) -> NoReturn:
    """End the process with one line and the exit code of a signal."""
    with contextlib.suppress(OSError):
        os.write(2, b"Interrupted.\n" if number == signal.SIGINT else b"Terminated.\n")
    exit_now(128 + number)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads of libraries.

    After an interrupt they may never end, or still compute on arrays that Python would free.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    while frame:
        # An import that is cut off can't be repeated: the library may abort the process.
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave()
        frame = frame.f_back
    global _pending
    _pending = True
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    raise KeyboardInterrupt
