"""What training starts with: model, state and batches, new or from the latest checkpoint."""

from pathlib import Path
from typing import NamedTuple

import grain
import jax
from ml_collections import ConfigDict

from lstm_jax import batches
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.data.encoding import Text
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, workdir
from lstm_jax.train_step import TrainState, init_state
from lstm_jax.vocabulary import Ids, Vocabulary


def check_recurrence(config: ConfigDict) -> None:
    """Raise `UserError` if `model.recurrence` can't run on this device; it initializes JAX."""
    try:
        model_lib.make_model(config.model, 1).implementation()
    except ValueError as error:
        raise UserError(f"config.model.recurrence: {error}") from None


class Start(NamedTuple):
    """What training starts with, whether the run is new or restored."""

    model: model_lib.LanguageModel
    state: TrainState
    iterator: grain.DatasetIterator  # Over training batches, or over their places.
    step: int  # Training steps done.
    steps_per_epoch: int
    total_steps: int  # Until the end of the last epoch.
    history: dict[str, int] | None  # `workdir.history_sizes` when it was saved; None if it is new.
    trained: workdir.Trained | None  # The run that a new run takes its first weights from, if any.


def restore_run(
    config: ConfigDict,
    directory: Path,
    vocabulary: Vocabulary,
    text: Text,
    ids: Ids,
    mesh: jax.sharding.Mesh | None = None,
    places: bool = False,
) -> Start:
    """Make model, state and batches, and restore them from the latest checkpoint if there is one.

    Args:
      config: a settled config (`resume.settle_run`).
      directory: the working directory.
      vocabulary: the vocabulary of the model.
      text: the training text.
      ids: its ids.
      mesh: the devices; None for the default device.
      places: see `batches.make_batches`.

    Raises:
      UserError: if the text is too short, or the working directory is damaged or has more epochs.
    """
    part = (jax.process_index(), jax.process_count())
    iterator, steps_per_epoch = batches.make_batches(ids, config.batches, config.seed, places, part)
    total_steps = config.num_epochs * steps_per_epoch
    model = model_lib.make_model(config.model, len(vocabulary))
    saved_in = directory / workdir.CHECKPOINTS
    is_new = not checkpoints.list_steps(saved_in)
    trained = workdir.load_trained(config.init_from) if config.init_from and is_new else None
    state = init_state(
        model,
        optimizer_lib.make_optimizer(config.optimizer, total_steps),
        jax.random.key(config.seed),
        config.batches.batch_size,
        averaged=config.optimizer.average_decay > 0,
        trained=trained.params if trained else None,
        mesh=mesh,
        counts=text.count_tokens(vocabulary) if is_new else None,
    )
    restored = checkpoints.restore_latest(saved_in, state.evaluated, state.rest, iterator)
    step, history = 0, None
    if restored:
        step, history = restored.step, restored.history
        state = TrainState.join(restored.params, restored.state)
    elif (directory / workdir.METRICS).exists():
        raise UserError(
            f"{directory} holds {workdir.METRICS} but no checkpoint: restore "
            f"{workdir.CHECKPOINTS}/, or start a new run with another --workdir"
        )
    if step > total_steps:
        raise UserError(
            f"the run in {directory} has trained {step / steps_per_epoch:g} epochs already, and "
            f"--config.num_epochs={config.num_epochs} is fewer: name more, or another --workdir"
        )
    return Start(model, state, iterator, step, steps_per_epoch, total_steps, history, trained)
