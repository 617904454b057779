"""Print safely: any text can be shown, and a stream that fails causes one clear message."""

import contextlib
import inspect
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import regex

from lstm_jax.errors import UserError
from lstm_jax.vocabulary import FILE_END

# Characters that a terminal executes instead of showing them.
_CONTROL = regex.compile(r"(?!\r\n|[\n\t])\p{Cc}")


def protect_streams() -> None:
    """Make the three standard streams safe to use; call it once, when a command starts.

    Raise `UserError` if standard output is closed. Characters that its encoding lacks are escaped.
    """
    for number in range(3):  # The next opened file would get the number of a closed stream.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
    if sys.stdout is None:
        raise UserError("standard output is closed: redirect it to a file, or to /dev/null")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = _Output(sys.stdout)
    sys.unraisablehook = _report_unraisable


def discard_output() -> None:
    """Discard buffered output, which Python would report as an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def make_printable(text: str) -> str:
    r"""Return a text that a terminal shows as it is.

    Bytes that are not UTF-8 become U+FFFD, control characters escapes such as \x1b (except for line
    breaks and tabs), and the end of a file a blank line.
    """
    text = regex.sub("[\ud800-\udfff]", "\ufffd", escape_controls(text))
    return text.replace(FILE_END, "\n\n")


def make_printer() -> Callable[[str, bool], str]:
    r"""Return a function like `make_printable`, for a text that arrives in pieces.

    Its second argument is true for the last piece. Until then it holds back a final \r, which is
    half a line break if \n follows.
    """
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    return lambda piece, final: make_printable(decoder.decode(piece, final))


def escape_controls(text: str) -> str:
    r"""Return a text with escapes such as \x1b for control characters.

    Line feeds, tabs and the \r before a line feed are kept.
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


@contextlib.contextmanager
def quieten(quiet: bool) -> Iterator[None]:
    """Print nothing in the block if `quiet`; all processes but the first drop standard output."""
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(_mute())
        from lstm_jax.devices import hosts  # It imports JAX.

        if not hosts.is_first():
            silence = stack.enter_context(open(os.devnull, "w", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield


# The threads that are muted now; blocks of several may end in any order.
_muted: list[int] = []
_lock = threading.Lock()


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Drop what this thread prints, to either stream, until the end of the block."""
    with _lock:
        if not _muted:
            sys.stdout, sys.stderr = _Muted(sys.stdout), _Muted(sys.stderr)
        _muted.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _muted.remove(threading.get_ident())
            if not _muted:
                for name in ("stdout", "stderr"):
                    if isinstance(stream := getattr(sys, name), _Muted):
                        setattr(sys, name, stream._stream)


class _Stream:
    """A stream that writes to another one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class _Muted(_Stream):
    """A stream that drops what muted threads write, and that is not a terminal."""

    def write(self, text: str) -> int:
        muted = threading.get_ident() in _muted
        return len(text) if muted else int(self._stream.write(text))

    def isatty(self) -> bool:
        return False


class _Output(_Stream):
    """Standard output that raises `UserError` when it can't be written.

    An `OSError` would look like a failure of the run's own files. `BrokenPipeError` is raised as it
    is.
    """

    def write(self, text: str) -> int:
        return int(self._call(self._stream.write, text))

    def flush(self) -> None:
        self._call(self._stream.flush)

    def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            discard_output()
            raise UserError(f"can't write to standard output: {error.strerror}") from None


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report an unraisable exception, but none of Orbax's threads and coroutines.

    They go on after one of them has failed, and the failure itself is reported.
    """
    is_closed = str(unraisable.exc_value) == "Event loop is closed"
    if not is_closed and not inspect.iscoroutine(unraisable.object):
        sys.__unraisablehook__(unraisable)
