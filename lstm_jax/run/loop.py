"""The training loop as its observers see it: where it is, and when it calls them."""

import dataclasses

from lstm_jax.train_step import TrainState


@dataclasses.dataclass
class Loop:
    """Where training is. `training.take_steps` moves it; observers read it, and may change it."""

    state: TrainState
    step: int  # Training steps done.
    last_step: int  # Training ends after it. An observer may end it earlier.
    # Whether all processes are at this step now, so that they may agree on something.
    in_step: bool = True
    exit_code: int = 0  # Of the command, if a signal ends training.


class Observer:
    """Does something after training steps. A loop has a list of observers, in a stated order."""

    def before_first_step(self, loop: Loop) -> None:
        """Look at a loop that starts or resumes."""

    def after_step(self, loop: Loop) -> None:
        """Look at a loop after each call of the training step."""
