"""Print safely: any text can be shown."""

import inspect
import io
import os
import sys
from collections.abc import Callable

import regex

from lstm_jax.vocabulary import FILE_END

# Characters that a terminal executes instead of showing them.
_CONTROL = regex.compile(r"(?!\r\n|[\n\t])\p{Cc}")


def protect_streams() -> None:
    """Escape characters that standard output can't encode; call it once, when a command starts.

    Nothing that threads of libraries fail at, after an error, is reported.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
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


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report an unraisable exception, but none of Orbax's threads and coroutines.

    They go on after one of them has failed, and the failure itself is reported.
    """
    is_closed = str(unraisable.exc_value) == "Event loop is closed"
    if not is_closed and not inspect.iscoroutine(unraisable.object):
        sys.__unraisablehook__(unraisable)
