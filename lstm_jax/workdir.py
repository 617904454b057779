"""The working directory of a run: its config, its vocabulary and its checkpoints."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Vocabulary

CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples.txt"
CURVES = "curves.png"
# Files that a run appends to. A checkpoint holds their sizes, so that a run that goes on from it
# first drops what was written after it.
HISTORY = (METRICS, SAMPLES)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      UserError: if there is no run, or its config is damaged.
    """
    if not (workdir / CONFIG).exists():
        raise UserError(
            f"there is no trained model in {workdir} (no {CONFIG}): name the --workdir of a "
            f"training run, or train one with python -m lstm_jax.main --workdir {workdir}"
        )
    try:
        fields = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / CONFIG} is damaged: {error}") from None
    return config_lib.complete(fields)


def load_vocabulary(workdir: Path) -> Vocabulary:
    """The vocabulary of the run in `workdir`.

    Raises:
      UserError: if it is missing or damaged.
    """
    try:
        return Vocabulary.from_json((workdir / VOCABULARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / VOCABULARY} is missing or damaged: {error}") from None


def open_checkpoints(workdir: Path, read_only: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a run: asynchronous and atomic; kept are the latest two and the best."""

    def loss(metrics: dict[str, float]) -> float:
        return metrics["validation_loss"]

    policies = ocp.checkpoint_managers.preservation_policy
    return ocp.CheckpointManager(
        (workdir / CHECKPOINTS).absolute(),
        options=ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(2),
                    policies.BestN(
                        n=1,
                        get_metric_fn=loss,
                        reverse=True,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
        ),
    )


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    params: Any,
    state: Any,
    iterator: grain.DatasetIterator,
    validation_loss: float | None = None,
) -> None:
    """Starts to save a checkpoint; the arrays may be donated as soon as this returns.

    Args:
      checkpoints: of the run.
      step: training steps done.
      params: the model's parameters.
      state: every other array that training goes on from.
      iterator: of the training batches.
      validation_loss: in nats per token, where it was measured at this step.
    """
    workdir = Path(checkpoints.directory).parent
    sizes = {name: _size(workdir / name) for name in HISTORY}
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(state),
            batches=grain.checkpoint.CheckpointSave(iterator),
            history=ocp.args.JsonSave(sizes),
        ),
        metrics=None if validation_loss is None else {"validation_loss": validation_loss},
    )


def restore(
    checkpoints: ocp.CheckpointManager,
    step: int,
    params: Any,
    state: Any,
    iterator: grain.DatasetIterator,
) -> tuple[Any, Any]:
    """Reads a checkpoint back, iterator included, and drops the history written after it.

    Args:
      checkpoints: of the run.
      step: which checkpoint.
      params: arrays, or their shapes and dtypes, of the structure to be read.
      state: likewise.
      iterator: of the training batches; it is moved to where the checkpoint was.

    Returns:
      The parameters and the state.
    """
    restored = checkpoints.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(params)),
            state=ocp.args.StandardRestore(_abstract(state)),
            batches=grain.checkpoint.CheckpointRestore(iterator),
            history=ocp.args.JsonRestore(),
        ),
    )
    workdir = Path(checkpoints.directory).parent
    for name, size in restored.history.items():
        if _size(workdir / name) > size:
            os.truncate(workdir / name, size)
    return restored.params, restored.state


def load_params(
    checkpoints: ocp.CheckpointManager, step: int, model: model_lib.LanguageModel
) -> model_lib.Params:
    """The parameters of the checkpoint at `step`, on this machine's default device."""
    abstract = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
    args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(abstract)))
    return checkpoints.restore(step, args=args).params


class Trained(NamedTuple):
    """A trained model, read from a working directory."""

    config: ConfigDict
    vocabulary: Vocabulary
    model: model_lib.LanguageModel
    params: model_lib.Params
    step: int


def load(workdir: Path) -> Trained:
    """The trained model in `workdir`: the best checkpoint by validation loss, else the latest.

    Raises:
      UserError: if there is none.
    """
    config = load_config(workdir)
    vocabulary = load_vocabulary(workdir)
    config.model.recurrence = "auto"  # The run's own may need another kind of device.
    model = model_lib.from_config(config.model, len(vocabulary))
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        step = best_step(checkpoints)
        if step is None:
            raise UserError(f"{workdir} has no checkpoint yet: wait for, or train, the first epoch")
        params = load_params(checkpoints, step, model)
    return Trained(config, vocabulary, model, params, step)


def best_step(checkpoints: ocp.CheckpointManager) -> int | None:
    """The step of the best checkpoint by validation loss, else of the latest, else None."""
    best = checkpoints.best_step()
    return checkpoints.latest_step() if best is None else best


def _abstract(tree: Any) -> Any:
    """Shapes and dtypes, to be placed on this machine's default device wherever they were saved."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
