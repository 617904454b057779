"""Ctrl-C, from the first line of a command to its last: one line, and exit code 130.

Python raises KeyboardInterrupt wherever the program is at that moment. That may be within the
import of a library, or within a callback from which no exception gets out, so that it is lost.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # The exit code that a shell reports for a command that Ctrl-C ended.
# An interruption that nobody has answered after so long was lost, and is raised again.
_AGAIN_SECONDS = 5

_came = False


def exit_at_once() -> None:
    """Let Ctrl-C end the process where it is. To be called before anything is written.

    Where SIGINT is ignored, as in a shell's background jobs, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_from_here() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, again and again until it is answered."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGALRM, _raise)
        signal.signal(signal.SIGINT, _raise)


def answer() -> None:
    """Note that an interruption has had its effect: the program continues."""
    global _came
    _came = False
    signal.setitimer(signal.ITIMER_REAL, 0)


def end() -> bool:
    """Ignore Ctrl-C from here on; return whether an interruption came that is not answered."""
    if signal.getsignal(signal.SIGINT) is _raise:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    came = _came
    answer()
    return came


def leave() -> NoReturn:
    """End the process: one line, and exit code 130.

    What a library's threads wait for when an interruption came in between may never come.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    leave()


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    global _came
    _came = True
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    raise KeyboardInterrupt
