"""Plan the steps of a run: where it logs and validates, where it ends, and its learning rate."""

import jax
from ml_collections import ConfigDict

from lstm_jax import optimizer as optimizer_lib


class Plan:
    """The steps of a run with this config, for a text with this number of steps per epoch.

    Attributes:
      steps_per_epoch: the number of steps per epoch.
      total_steps: the number of steps until the end of the run.
    """

    def __init__(self, config: ConfigDict, steps_per_epoch: int) -> None:
        self._config, self.steps_per_epoch = config, steps_per_epoch
        self.total_steps = config.num_epochs * steps_per_epoch
        # Jitted, because a schedule is many operations.
        self._schedule = jax.jit(optimizer_lib.make_schedule(config.optimizer, self.total_steps))

    def count_epochs(self, step: int) -> float:
        """Return the number of passes over the training text after `step` steps."""
        return step / self.steps_per_epoch

    def validates_at(self, step: int) -> bool:
        """Return whether the run validates after `step` steps."""
        return step % self.steps_per_epoch == 0

    def count_steps_of_call(self, step: int) -> int:
        """Return the number of steps of the next call, which must not cross a log or validation."""
        number = self._config.steps_per_call
        ends = (self._config.log_every_steps, self.steps_per_epoch)
        return number if all(step % n + number <= n for n in ends) else 1

    def get_learning_rate(self, step: int, skipped: int) -> float:
        """Return the learning rate of a step, the first of which is 1; `skipped` are not counted.

        It has six digits, because it was computed in float32.
        """
        return float(f"{float(self._schedule(step - skipped - 1)):.6g}")
