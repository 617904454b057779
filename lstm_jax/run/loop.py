"""The training loop as its observers see it: where it is, and when it calls them."""

import dataclasses

from lstm_jax.train_step import TrainState


@dataclasses.dataclass
class Loop:
    """Where training is. `training.take_steps` moves it; observers read it, and may change it."""

    state: TrainState
    step: int  # Training steps done.
    last_step: int  # Training ends after it. An observer may end it earlier.
    # Whether all processes are at this step now, so that they may wait for each other.
    in_step: bool = True
    exit_code: int = 0  # Of the command, if a signal ends training.


class Observer:
    """A hook of the training loop, which calls its observers in the order of their list."""

    def before_first_step(self, loop: Loop) -> None:
        """Act before the first step of a new or a resumed run."""

    def after_step(self, loop: Loop) -> None:
        """Act after each call of the training step."""
