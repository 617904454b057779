"""Plan a run: at which steps it logs and validates, where it ends; its learning rate."""

import jax

from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config
from lstm_jax.errors import UserError


class Plan:
    """The steps of a run with this config, for a text with this number of steps per epoch.

    Raise `UserError` if there are too many.

    Attributes:
      steps_per_epoch: the number of steps per epoch.
      total_steps: the number of steps until the end of the run, unless `patience` ends it earlier.
      limit: the field that determines it, "num_epochs" or "max_steps".
      tokens_per_step: the number of tokens of a step.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self._config, self.steps_per_epoch = config, steps_per_epoch
        self.total_steps, self.limit = config.num_epochs * steps_per_epoch, "num_epochs"
        if 0 < config.max_steps < self.total_steps:
            self.total_steps, self.limit = config.max_steps, "max_steps"
        if self.total_steps >= 2**31:  # Steps are counted in int32.
            raise UserError(
                f"the run would have {self.total_steps:,} steps, more than 2,147,483,647: lower "
                "config.num_epochs, or set config.max_steps"
            )
        self.tokens_per_step = config.batches.batch_size * config.batches.window_length
        # Jitted, because a schedule is many operations.
        self._schedule = jax.jit(optimizer_lib.make_schedule(config.optimizer, self.total_steps))

    def count_epochs(self, step: int) -> float:
        """Return the number of passes over the training text after `step` steps."""
        return step / self.steps_per_epoch

    def describe_length(self, step: int) -> str:
        """Return how long a run is after `step` steps, in the unit of its limit."""
        if self.limit == "max_steps":
            return f"{step} steps"
        return f"{round(self.count_epochs(step), 4):g} epochs"

    def validates_at(self, step: int) -> bool:
        """Return whether the run saves and validates after `step` steps, which may be 0."""
        every = self._config.validate_every_steps or self.steps_per_epoch
        return not step % every or not step % self.steps_per_epoch or step == self.total_steps

    def count_steps_of_call(self, step: int) -> int:
        """Return the number of steps of the next call, which must not cross a log or validation."""
        number, log_every = self._config.steps_per_call, self._config.log_every_steps
        inside = range(step + 1, step + number)
        return 1 if any(not n % log_every or self.validates_at(n) for n in inside) else number

    def get_learning_rate(self, step: int, skipped: int) -> float:
        """Return the learning rate of a step, counted from 1 and without `skipped` steps.

        It is rounded to six digits, because it was computed in float32.
        """
        return float(f"{float(self._schedule(step - skipped - 1)):.6g}")
