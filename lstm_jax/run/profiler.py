"""A trace of a few training steps, for TensorBoard or xprof to open."""

from pathlib import Path

import jax

# Steps left alone, in which things compile and buffers are first filled; and steps traced.
_WARM_UP, _STEPS = 3, 5


class Profiler:
    """Traces some steps of a run, once, soon after it starts or goes on."""

    def __init__(self, directory: Path | None, step: int) -> None:
        """Starts when `step` steps are done.

        Args:
          directory: below which the trace is written, as plugins/profile/TIME/; None for no trace.
          step: training steps done.
        """
        self._directory, self._first = directory, step + _WARM_UP
        self._is_tracing = False

    def keep(self, step: int, array: jax.Array) -> None:
        """Begins or ends the trace if it is time to, after step `step`, which computes `array`."""
        if self._directory is None or step < self._first:
            return
        if not self._is_tracing:
            jax.block_until_ready(array)
            jax.profiler.start_trace(str(self._directory))
            self._first, self._is_tracing = step, True
        elif step >= self._first + _STEPS:
            jax.block_until_ready(array)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if that was not done yet."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._directory, self._is_tracing = None, False
