"""How far training is: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows step, epoch, loss, speed and time left.

    On a terminal a bar on standard error; elsewhere a plain line every ten seconds on standard
    output.
    """

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Starts at `step` of `total_steps`."""
        self._first = self._step = self._clock_step = step
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._started = self._clock = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        )

    def start_clock(self, step: int) -> None:
        """Measures the speed anew from here, when `step` steps are done."""
        self._clock_step, self._clock = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        """The speed since the clock was last started, which it is again; 0 if no step was done."""
        seconds = time.monotonic() - self._clock
        steps = step - self._clock_step
        self.start_clock(step)
        return steps / seconds if steps else 0.0

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done, at this training loss and speed."""
        text = (
            f"step {step}/{self._total}, epoch {step / self._steps_per_epoch:.2f}, "
            f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        )
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / (step - self._first) * (self._total - step)
            minutes, seconds = divmod(round(left), 60)
            print(f"{text}, {minutes}:{seconds:02} left", flush=True)

    def print(self, text: str) -> None:
        """Prints to standard output, above the bar."""
        with tqdm.external_write_mode(sys.stdout):
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar where it is."""
        self._bar.close()
