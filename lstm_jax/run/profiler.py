"""Trace a few training steps, for TensorBoard or xprof."""

from pathlib import Path

import jax

from lstm_jax.run.loop import Loop, Observer

# Steps before the trace, which compile and fill buffers, and traced steps.
_WARM_UP, _STEPS = 3, 5


class Profiler(Observer):
    """Traces some steps of a run once, soon after it starts or resumes."""

    def __init__(self, directory: Path | None, step: int) -> None:
        """Start at `step`; trace into `directory`/plugins/profile/TIME/, or not at all if None."""
        self._directory, self._next, self._is_tracing = directory, step + _WARM_UP, False

    def after_step(self, loop: Loop) -> None:
        """Start or stop the trace if it is time to, when the device has finished the step."""
        if self._directory is None or loop.step < self._next:
            return
        jax.block_until_ready(loop.state.loss_sum)
        if self._is_tracing:
            self.close()
        else:
            jax.profiler.start_trace(str(self._directory))
            self._next, self._is_tracing = loop.step + _STEPS, True

    def close(self) -> None:
        """Write the trace if it is still recording."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._directory, self._is_tracing = None, False
