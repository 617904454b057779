"""Wait for a call in another thread, so that Ctrl-C or a limit of time ends the wait."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def call_in_thread(
    function: Callable[..., T], *arguments: object, seconds: float | None = None
) -> T:
    """Return the result of a function that may not return to Python for a long time.

    Raise what the function raises, or `TimeoutError` if it takes longer than `seconds`. The thread
    then continues, unless the process ends.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result(seconds)
