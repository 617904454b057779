"""Train many models at once with one compiled program, each as if it was trained alone.

The members of a population differ in config fields that the program reads as arrays. They are
divided over the devices. A CPU has a device per core, which computes its members one after the
other, because XLA's CPU backend is slow at batched matmuls. A GPU or TPU computes its members
together, under `jax.vmap`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from lstm_jax import batches
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.data import texts
from lstm_jax.devices import parallel
from lstm_jax.devices.memory import keep_freed_memory
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import checkpoints, lock, metrics, resume, workdir
from lstm_jax.train_step import TrainState, make_step
from lstm_jax.vocabulary import Ids

# The default size of a population of seeds, at most.
LARGEST = 16

_MEMBERS = PartitionSpec("members")


class _Member(NamedTuple):
    """A member: its config, working directory, first state and checkpoints."""

    config: ConfigDict
    directory: Path
    start: resume.Start
    checkpoints: checkpoints.CheckpointWriter
    is_ours: Callable[[], bool]


def train_population(
    configs: Sequence[ConfigDict],
    directories: Sequence[Path],
    on_validation: Callable[[int, int, float], None],
) -> list[str]:
    """Train a model for each config, or resume from the working directories.

    Each gets a working directory as if it was trained alone, but without samples and curves.

    Args:
      configs: complete configs of the same text, which differ in `config.TRACEABLE` fields.
      directories: the working directory of each.
      on_validation: called with the member, the epoch and the validation loss.

    Returns:
      For each member the reason why it has no result; empty if it has one.

    Raises:
      UserError: if they differ in other fields, the text can't be read or is too short, or a
        directory is in use.
    """
    check_members(configs)
    keep_freed_memory()
    splits = texts.load_texts(configs[0].data)
    training_text = splits.texts["train"]
    ids: dict[str, Ids] = {}
    with contextlib.ExitStack() as held:
        members = []
        for config, directory in zip(configs, directories, strict=True):
            is_ours = held.enter_context(lock.hold_lock(directory))
            settled = resume.settle_run(
                splits.settle(config), directory, lambda: training_text.vocabulary(configs[0].data)
            )
            ids = ids or splits.encode(settled.vocabulary)
            start = resume.restore_run(settled, directory, ids["train"], training_text.count_tokens)
            writer = checkpoints.CheckpointWriter(directory / workdir.CHECKPOINTS)
            held.enter_context(writer)
            if start.history is not None:
                workdir.restore_history(directory, start.history)
            members.append(_Member(settled.config, directory, start, writer, is_ours))
        reasons = [""] * len(members)
        # Members that a kill left at different epochs are trained in groups.
        for step in sorted({member.start.step for member in members}):
            group = [i for i, member in enumerate(members) if member.start.step == step]

            def report(place: int, epoch: int, loss: float, group: list[int] = group) -> None:
                on_validation(group[place], epoch, loss)

            found = _train_group([members[i] for i in group], ids, len(settled.vocabulary), report)
            for i, reason in zip(group, found, strict=True):
                reasons[i] = reason
    return reasons


def check_members(configs: Sequence[ConfigDict]) -> None:
    """Raise `UserError` if one program can't train these configs together."""
    if configs[0].init_from:
        raise UserError(
            "the members of a population start from fresh weights: leave out "
            "--config.init_from or --population"
        )
    resume.check_recurrence(configs[0])
    first = dict(config_lib.flatten(configs[0]))
    for config in configs[1:]:
        for field, value in config_lib.flatten(config):
            if value != first[field] and field not in config_lib.TRACEABLE:
                raise UserError(
                    f"the members of a population can't differ in config.{field}, which is "
                    f"{first[field]!r} and {value!r}: leave out --population, or vary only "
                    f"{', '.join(config_lib.TRACEABLE)}"
                )


def make_mesh(members: int) -> Mesh:
    """Return the devices that members are divided over, along the axis "members"."""
    devices = jax.devices()[:members]
    return jax.make_mesh(
        (len(devices),), ("members",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def map_members(function: Callable[..., Any], mesh: Mesh, donated: tuple[int, ...] = ()) -> Any:
    """Jit a function of one member for all members, the first axis of all arrays.

    Args:
      function: the function, of any number of arguments.
      mesh: from `make_mesh`; its size divides the number of members.
      donated: the arguments that are donated.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def on_one_device(*arguments: Any) -> Any:
        if on_cpu:
            return jax.lax.map(lambda each: function(*each), arguments)
        return jax.vmap(function)(*arguments)

    divided = parallel.shard_map(on_one_device, mesh, in_specs=_MEMBERS, out_specs=_MEMBERS)
    return jax.jit(divided, donate_argnums=donated)


def hyperparameters(configs: Sequence[ConfigDict]) -> dict[str, jax.Array]:
    """Return the fields of the training step in which the configs differ, [members] each."""
    columns: dict[str, list[Any]] = {}
    for config in configs:
        for field, value in config_lib.flatten(config):
            if field in config_lib.TRACED_BY_STEP:
                number = optimizer_lib.SCHEDULES.index(value) if isinstance(value, str) else value
                columns.setdefault(field, []).append(number)
    return {
        field: jnp.asarray(column, jnp.int32 if isinstance(column[0], int) else jnp.float32)
        for field, column in columns.items()
        if len(set(column)) > 1
    }


def make_population_step(
    config: ConfigDict, vocabulary_size: int, total_steps: int, mesh: Mesh
) -> Callable[[dict[str, jax.Array], TrainState, batches.Batch], TrainState]:
    """Make a training step of all members, from their `hyperparameters`, states and batches.

    Args:
      config: the config of any member.
      vocabulary_size: the size of the vocabulary.
      total_steps: training steps until the end of the last epoch.
      mesh: from `make_mesh`.
    """

    def step(traced: dict[str, jax.Array], state: TrainState, batch: batches.Batch) -> TrainState:
        own = _with_arrays(config, traced)
        model = model_lib.make_model(config.model, vocabulary_size)
        optimizer = optimizer_lib.make_optimizer(own.optimizer, total_steps)
        return make_step(model, optimizer, own, None)(state, batch)

    return map_members(step, mesh, donated=(1,))


def stack(members: Sequence[Any], mesh: Mesh) -> Any:
    """Stack the arrays of all members, [members, ...], on the devices of a mesh."""
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)
    return parallel.place(stacked, mesh, _MEMBERS)


def _with_arrays(config: ConfigDict, traced: dict[str, jax.Array]) -> ConfigDict:
    """Return the config with arrays in some of its fields."""
    own = ConfigDict(config.to_dict(), type_safe=False)
    for field, array in traced.items():
        part, _, name = field.partition(".")
        own[part][name] = array
    return own


def _train_group(
    members: Sequence[_Member],
    ids: dict[str, Ids],
    vocabulary_size: int,
    on_validation: Callable[[int, int, float], None],
) -> list[str]:
    """Train members that are at the same step; see `train_population`."""
    config, first = members[0].config, members[0].start
    step, steps_per_epoch, total_steps = first.step, first.steps_per_epoch, first.total_steps
    states = [member.start.state for member in members]
    if any(member.config.optimizer.average_decay for member in members):
        states = [s if s.average is not None else s._replace(average=s.params) for s in states]
    mesh = make_mesh(len(members))
    # Each device has the same number of members: the first member fills the empty places.
    filled = [*range(len(members)), *[0] * (-len(members) % mesh.size)]
    traced = hyperparameters([members[i].config for i in filled])
    traced = parallel.place(traced, mesh, _MEMBERS)
    state = stack([states[i] for i in filled], mesh)
    train_step = make_population_step(config, vocabulary_size, total_steps, mesh)
    model = model_lib.make_model(config.model, vocabulary_size)
    tokens_per_step = config.batches.batch_size * config.batches.window_length
    reasons = [""] * len(members)
    clock, logged = time.monotonic(), step

    read = _make_read(model, mesh)

    def read_losses(params: Any, split: str) -> list[float]:
        return [float(loss) for loss in read(params, ids[split])[: len(members)]]

    with contextlib.ExitStack() as held:
        writers = [
            held.enter_context(metrics.MetricsWriter(member.directory / workdir.METRICS, step))
            for member in members
        ]

        def validate() -> None:
            epoch = step // steps_per_epoch
            losses = read_losses(state.evaluated, "validation")
            for i, loss in enumerate(losses):
                if not reasons[i]:
                    writers[i].write(step, epoch, "validation", loss)
                    members[i].checkpoints.record_validation(step, loss)
                    on_validation(i, epoch, loss)

        if step == 0:
            _save(members, state, reasons, step)
        validate()
        while step < total_steps:
            parts = [next(member.start.iterator) for member in members]
            batch: Any = jax.tree.map(lambda *arrays: np.stack(arrays), *[parts[i] for i in filled])
            state = train_step(traced, state, batch)
            step += 1
            if step % config.log_every_steps == 0 or step % steps_per_epoch == 0:
                skipped = np.asarray(state.skipped)
                for i, member in enumerate(members):
                    if skipped[i] > member.config.max_skipped_steps and not reasons[i]:
                        bad = int(state.first_skipped[i])
                        reasons[i] = (
                            f"a parameter, the loss or a gradient of step {bad} is not finite"
                        )
            if step % config.log_every_steps == 0:
                now = time.monotonic()
                speed = round((step - logged) * tokens_per_step / (now - clock))
                clock, logged = now, step
                sums, counts = np.asarray(state.loss_sum), np.asarray(state.loss_steps)
                for i, writer in enumerate(writers):
                    if counts[i] and not reasons[i]:
                        epoch, loss = step / steps_per_epoch, float(sums[i] / counts[i])
                        writer.write(step, epoch, "train", loss, tokens_per_second=speed)
                state = state._replace(
                    loss_sum=jnp.zeros_like(state.loss_sum),
                    loss_steps=jnp.zeros_like(state.loss_steps),
                )
            if step % steps_per_epoch == 0:
                _save(members, state, reasons, step)
                validate()
        best = _best(members, model)
        losses = read_losses(stack([best[i][0] for i in filled], mesh), "test")
        for i, loss in enumerate(losses):
            if math.isfinite(loss) and not reasons[i]:
                at = best[i][1]
                writers[i].write(at, at / steps_per_epoch, "test", loss)
    return reasons


def _save(members: Sequence[_Member], state: TrainState, reasons: Sequence[str], step: int) -> None:
    """Save a checkpoint of each member that has not failed and has none of this step."""
    keys = jax.random.key_data(state.key)
    arrays = jax.device_get(state._replace(key=keys))
    for i, member in enumerate(members):
        # The first one may exist: the members of a group need not have started together.
        if reasons[i] or step in checkpoints.list_steps(member.directory / workdir.CHECKPOINTS):
            continue
        if not member.is_ours():
            raise UnavailableError(f"another process has taken over {member.directory}")
        own = jax.tree.map(lambda array, i=i: jnp.asarray(array[i]), arrays)
        own = own._replace(key=jax.random.wrap_key_data(own.key))
        if not member.config.optimizer.average_decay:
            own = own._replace(average=None)
        sizes = workdir.history_sizes(member.directory)
        member.checkpoints.save(step, own.evaluated, own.rest, member.start.iterator, sizes)


def _best(
    members: Sequence[_Member], model: model_lib.LanguageModel
) -> list[tuple[model_lib.Params, int]]:
    """Return the parameters of the best checkpoint of each member, and its step."""
    for member in members:
        member.checkpoints.wait()
    return [workdir.load_params(member.directory, model) for member in members]


def _make_read(
    model: model_lib.LanguageModel, mesh: Mesh
) -> Callable[[model_lib.Params, Ids], np.ndarray]:
    """Make `loss.compute_loss` of all members, from their parameters [members, ...] and ids."""

    def read_chunk(params: Any, carry: Any, chunk: Any) -> Any:
        return loss_lib.read_chunk(model, params, *chunk, carry, jnp.ones(1))

    read_all = map_members(read_chunk, mesh, donated=(1,))

    def read(params: model_lib.Params, ids: Ids) -> np.ndarray:
        number = len(jax.tree.leaves(params)[0])
        carry = stack([model.initial_carry(loss_lib.count_streams(ids))] * number, mesh)
        total = np.zeros(number)
        for chunk in loss_lib.iterate_chunks(ids):
            everyone = tuple(np.broadcast_to(array, (number, *array.shape)) for array in chunk)
            losses, carry = read_all(params, carry, everyone)
            total += np.asarray(losses[:, 0], np.float64)
        return total / (len(ids) - 1)

    return read
