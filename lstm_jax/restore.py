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
    """What training starts with, whether the run is new or restored.

    Attributes:
      model: the model.
      state: the training state.
      iterator: over training batches, or over their places where the text is on the devices.
      step: training steps done.
      steps_per_epoch: training steps in a pass over the text.
      total_steps: training steps until the end of the last epoch.
      history: sizes of the files that the run appends to, at the checkpoint; None for a new run.
      trained: the run that a new run takes its first weights from, if any.
    """

    model: model_lib.LanguageModel
    state: TrainState
    iterator: grain.DatasetIterator
    step: int
    steps_per_epoch: int
    total_steps: int
    history: dict[str, int] | None
    trained: workdir.Trained | None


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
      places: whether the iterator yields places only, see `batches.make_batches`.

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
    if restored is None:
        if (directory / workdir.METRICS).exists():
            raise UserError(
                f"{directory} holds {workdir.METRICS} but no checkpoint: restore "
                f"{workdir.CHECKPOINTS}/, or start a new run with another --workdir"
            )
        return Start(model, state, iterator, 0, steps_per_epoch, total_steps, None, trained)
    if restored.step > total_steps:
        raise UserError(
            f"the run in {directory} has trained {restored.step / steps_per_epoch:g} epochs "
            f"already, and --config.num_epochs={config.num_epochs} is fewer: name more, or another "
            "--workdir"
        )
    state = TrainState.join(restored.params, restored.state)
    history = restored.history
    return Start(
        model, state, iterator, restored.step, steps_per_epoch, total_steps, history, trained
    )
