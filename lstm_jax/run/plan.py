"""Plan the steps of a run: when it logs, validates and ends."""

import jax

from lstm_jax import batches
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config


class Plan:
    """The steps of a run on a training text of `length` tokens."""

    def __init__(self, config: Config, length: int) -> None:
        self.config, self.length = config, length
        self.steps_per_epoch = batches.count_steps(length, config.batches)
        total_steps = config.num_epochs * self.steps_per_epoch
        # Until the end of the run, unless `patience` ends it earlier.
        self.total_steps = min(total_steps, config.max_steps or total_steps)
        schedule = optimizer_lib.make_schedule(config.optimizer, self.total_steps)
        self._schedule = jax.jit(schedule)  # It has many operations.

    def count_epochs(self, step: int) -> float:
        """Return the number of passes over the training text after `step` steps."""
        return step / self.steps_per_epoch

    def logs_at(self, step: int) -> bool:
        """Return whether the run logs the training loss after `step` steps."""
        return not step % self.config.log_every_steps

    def validates_at(self, step: int) -> bool:
        """Return whether the run validates, and saves before that, after `step` steps, or 0."""
        every = self.config.validate_every_steps or self.steps_per_epoch
        return not step % every or step == self.total_steps

    def get_learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1, in the six digits of float32."""
        return float(f"{float(self._schedule(step - 1)):.6g}")
