"""Many models trained at once by one compiled program, each as it would be trained alone.

The members of a population differ in fields that the program reads as arrays. They are divided over
the devices. On a CPU, where each core is a device, a device computes its members one after the
other: XLA multiplies batches of matrices slowly there. On a GPU or TPU it computes them together,
under `jax.vmap`.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
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
from lstm_jax.data import sources, texts
from lstm_jax.devices import parallel
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import checkpoints, lock, metrics, workdir
from lstm_jax.train import check_recurrence, keep_freed_memory
from lstm_jax.train_step import TrainState, init_state, make_step
from lstm_jax.vocabulary import Ids, Vocabulary

# The fields in which members may differ.
TRACEABLE = (
    "seed",
    "model.initial_scale",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.weight_decay",
    "optimizer.max_gradient_norm",
    "optimizer.momentum",
    "optimizer.average_decay",
    *(f"regularization.{name}" for name in config_lib.default().regularization),
)
# Those that only the first state and the order of the text follow from, not the step.
_OF_THE_START = ("seed", "model.initial_scale")

# How many are trained together unless the user says otherwise.
LARGEST = 16

_MEMBERS = PartitionSpec("members")


class _Member(NamedTuple):
    """What belongs to one member alone."""

    config: ConfigDict
    directory: Path
    iterator: grain.DatasetIterator
    checkpoints: checkpoints.CheckpointWriter
    is_ours: Callable[[], bool]


def train_population(
    configs: Sequence[ConfigDict],
    directories: Sequence[Path],
    on_validation: Callable[[int, int, float], None],
) -> list[str]:
    """Trains a model for each config, or goes on from what is in the directories.

    Each gets a working directory like one that was trained alone, but for samples and curves.

    Args:
      configs: complete ones, of the same text, that differ in `TRACEABLE` fields only.
      directories: the working directory of each.
      on_validation: called with the member, the epoch and the validation loss.

    Returns:
      Why a member has no result, for each of them; empty for those that have one.

    Raises:
      UserError: if they differ in other fields, the text can't be had or is too short, or a
        directory is in use.
    """
    check_members(configs)
    keep_freed_memory()
    splits = texts.load_texts(configs[0].data)
    vocabulary = splits.texts["train"].vocabulary(configs[0].data)
    ids = splits.encode(vocabulary)
    counts = splits.texts["train"].count_tokens(vocabulary)
    with contextlib.ExitStack() as held:
        members, states = [], []
        for config, directory in zip(configs, directories, strict=True):
            member, state = _open(
                held, config, directory, splits.sha256, vocabulary, ids["train"], counts
            )
            members.append(member)
            states.append(state)
        reasons = [""] * len(members)
        # Those that a kill left at different epochs go on in groups.
        for step in sorted({int(state.step) for state in states}):
            group = [i for i, state in enumerate(states) if int(state.step) == step]
            found = _train_group(
                [members[i] for i in group],
                [states[i] for i in group],
                ids,
                len(vocabulary),
                functools.partial(_tell, on_validation, group),
            )
            for i, reason in zip(group, found, strict=True):
                reasons[i] = reason
    return reasons


def _tell(
    on_validation: Callable[[int, int, float], None],
    group: Sequence[int],
    place: int,
    epoch: int,
    loss: float,
) -> None:
    """Names a member of a group by its place among all."""
    on_validation(group[place], epoch, loss)


def check_members(configs: Sequence[ConfigDict]) -> None:
    """Raises `UserError` for configs that one program can't serve, or not together."""
    if configs[0].init_from:
        raise UserError(
            "the members of a population begin anew: leave out --config.init_from or --population"
        )
    check_recurrence(configs[0])
    first = dict(config_lib.flatten(configs[0]))
    for config in configs[1:]:
        for field, value in config_lib.flatten(config):
            if value != first[field] and field not in TRACEABLE:
                raise UserError(
                    f"the members of a population can't differ in config.{field}, which is "
                    f"{first[field]!r} and {value!r}: leave out --population, or vary only "
                    f"{', '.join(TRACEABLE)}"
                )


def make_mesh(members: int) -> Mesh:
    """The devices that so many members are divided over, along the axis "members"."""
    devices = jax.devices()[:members]
    return jax.make_mesh(
        (len(devices),), ("members",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def map_members(function: Callable[..., Any], mesh: Mesh, donated: tuple[int, ...] = ()) -> Any:
    """A jitted function of arrays with the members as their first axis, from one of one member.

    Args:
      function: what is done for a member, of any number of arguments.
      mesh: from `make_mesh`; its size divides the number of members.
      donated: the arguments whose memory the results may take.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def on_one_device(*arguments: Any) -> Any:
        if on_cpu:
            return jax.lax.map(lambda each: function(*each), arguments)
        return jax.vmap(function)(*arguments)

    divided = parallel.shard_map(on_one_device, mesh, in_specs=_MEMBERS, out_specs=_MEMBERS)
    return jax.jit(divided, donate_argnums=donated)


def hyperparameters(configs: Sequence[ConfigDict]) -> dict[str, jax.Array]:
    """The fields of the step in which the configs differ, [members] each."""
    columns: dict[str, list[Any]] = {}
    for config in configs:
        for field, value in config_lib.flatten(config):
            if field in TRACEABLE and field not in _OF_THE_START:
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
    """One training step of every member, from `hyperparameters`, states and batches of all.

    Args:
      config: of any member.
      vocabulary_size: of all.
      total_steps: until the end of the last epoch.
      mesh: from `make_mesh`.
    """

    def step(traced: dict[str, jax.Array], state: TrainState, batch: batches.Batch) -> TrainState:
        own = _with_arrays(config, traced)
        model = model_lib.make_model(config.model, vocabulary_size)
        optimizer = optimizer_lib.make_optimizer(own.optimizer, total_steps)
        return make_step(model, optimizer, own, None)(state, batch)

    return map_members(step, mesh, donated=(1,))


def stack(members: Sequence[Any], mesh: Mesh) -> Any:
    """The arrays of all members, [members, ...], on the devices of a mesh."""
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)
    return parallel.place(stacked, mesh, _MEMBERS)


def _with_arrays(config: ConfigDict, traced: dict[str, jax.Array]) -> ConfigDict:
    """The config with arrays in some of its fields."""
    own = ConfigDict(config.to_dict(), type_safe=False)
    for field, array in traced.items():
        part, _, name = field.partition(".")
        own[part][name] = array
    return own


def _open(
    held: contextlib.ExitStack,
    config: ConfigDict,
    directory: Path,
    sha256: str,
    vocabulary: Vocabulary,
    ids: Ids,
    counts: np.ndarray,
) -> tuple[_Member, TrainState]:
    """A member with its working directory, and the state that it goes on from."""
    is_ours = held.enter_context(lock.hold_lock(directory))
    config = config.copy_and_resolve_references()
    config.data.sha256 = sha256
    if config.data.path:
        config.data.path = sources.make_absolute(config.data.path)
    workdir.check_own_files(directory)
    workdir.save_vocabulary(directory, vocabulary)
    workdir.save_config(directory, config)
    iterator, steps_per_epoch = batches.make_batches(ids, config.batches, config.seed)
    state = init_state(
        model_lib.make_model(config.model, len(vocabulary)),
        optimizer_lib.make_optimizer(config.optimizer, config.num_epochs * steps_per_epoch),
        jax.random.key(config.seed),
        config.batches.batch_size,
        averaged=config.optimizer.average_decay > 0,
        counts=counts,
    )
    saved_in = directory / workdir.CHECKPOINTS
    restored = checkpoints.restore_latest(saved_in, state.evaluated, state.rest, iterator)
    writer = held.enter_context(checkpoints.CheckpointWriter(saved_in))
    if restored is not None:
        state = TrainState.join(restored.params, restored.state)
        workdir.restore_history(directory, restored.history)
    return _Member(config, directory, iterator, writer, is_ours), state


def _train_group(
    members: Sequence[_Member],
    states: Sequence[TrainState],
    ids: dict[str, Ids],
    vocabulary_size: int,
    on_validation: Callable[[int, int, float], None],
) -> list[str]:
    """`train_population` for members that are at the same step."""
    config, step = members[0].config, int(states[0].step)
    _, steps_per_epoch = batches.make_batches(ids["train"], config.batches, config.seed)
    total_steps = config.num_epochs * steps_per_epoch
    if any(member.config.optimizer.average_decay for member in members):
        states = [s if s.average is not None else s._replace(average=s.params) for s in states]
    mesh = make_mesh(len(members))
    # As many on each device: what is missing is filled up with the first member.
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
            parts = [next(member.iterator) for member in members]
            batch: Any = jax.tree.map(lambda *arrays: np.stack(arrays), *[parts[i] for i in filled])
            state = train_step(traced, state, batch)
            step += 1
            if step % config.log_every_steps == 0 or step % steps_per_epoch == 0:
                skipped = np.asarray(state.skipped)
                for i, member in enumerate(members):
                    if skipped[i] > member.config.max_skipped_steps and not reasons[i]:
                        first = int(state.first_skipped[i])
                        reasons[i] = (
                            f"a parameter, the loss or a gradient of step {first} is not finite"
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
    """A checkpoint of each member that has none of this step and has not failed."""
    keys = jax.random.key_data(state.key)
    arrays = jax.device_get(state._replace(key=keys))
    for i, member in enumerate(members):
        # At the first step it may be there: the members of a group need not have begun together.
        if reasons[i] or step in checkpoints.list_steps(member.directory / workdir.CHECKPOINTS):
            continue
        if not member.is_ours():
            raise UnavailableError(f"another process has taken {member.directory} over")
        own = jax.tree.map(lambda array, i=i: jnp.asarray(array[i]), arrays)
        own = own._replace(key=jax.random.wrap_key_data(own.key))
        if not member.config.optimizer.average_decay:
            own = own._replace(average=None)
        sizes = workdir.history_sizes(member.directory)
        member.checkpoints.save(step, own.evaluated, own.rest, member.iterator, sizes)


def _best(
    members: Sequence[_Member], model: model_lib.LanguageModel
) -> list[tuple[model_lib.Params, int]]:
    """The parameters of the best checkpoint of each member, and its step."""
    for member in members:
        member.checkpoints.wait()
    return [workdir.load_params(member.directory, model) for member in members]


def _make_read(
    model: model_lib.LanguageModel, mesh: Mesh
) -> Callable[[model_lib.Params, Ids], np.ndarray]:
    """`loss_lib.compute_loss` of each member, from the parameters of all [members, ...] and ids."""

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
