"""Train and measure many models in one compiled program, from stacked arrays [members, ...].

The members of a population differ in config fields that the program reads as arrays. They are
divided over the devices. A CPU has a device per core, which computes its members one after the
other, because XLA's CPU backend is slow at batched matmuls. A GPU or TPU computes its members
together, under `jax.vmap`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.batches import Batch
from lstm_jax.config import SCHEDULES, Config, OptimizerConfig
from lstm_jax.devices import feeding, parallel
from lstm_jax.sweep import options
from lstm_jax.train_step import TrainState, make_step
from lstm_jax.vocabulary import Ids

T = TypeVar("T")

_MEMBERS = PartitionSpec("members")

TrainMembers = Callable[[dict[str, jax.Array], TrainState, Batch], TrainState]
# From parameters [members, ...] and ids to the loss of each member, and of the copies of the first.
ComputeLosses = Callable[[model_lib.Params, Ids], list[float]]


def make_mesh(members: int) -> Mesh:
    """Return the devices that members are divided over, along the axis "members"."""
    return Mesh(np.array(jax.devices()[:members]), ("members",))


def stack(members: Sequence[T], mesh: Mesh) -> T:
    """Stack the arrays of all members, [members, ...], on the devices of a mesh."""
    stacked: T = jax.tree.map(lambda *arrays: jnp.stack(arrays), *_fill(members, mesh))
    return parallel.place(stacked, mesh, _MEMBERS)


def stack_states(members: Sequence[TrainState], mesh: Mesh) -> TrainState:
    """Stack the states of all members; if one averages its parameters, all have an average."""
    if any(state.average is not None for state in members):
        members = [state._replace(average=state.evaluated) for state in members]
    return stack(members, mesh)


def unstack_states(stacked: TrainState) -> Iterator[TrainState]:
    """Yield the state of each member, and of the copies of the first, on the default device."""
    arrays = jax.device_get(stacked._replace(key=jax.random.key_data(stacked.key)))
    for i in range(len(arrays.step)):
        state = jax.tree.map(lambda array, i=i: jnp.asarray(array[i]), arrays)
        yield state._replace(key=jax.random.wrap_key_data(state.key))


def read_batches(iterators: Sequence[grain.DatasetIterator], mesh: Mesh, steps: int) -> Batch:
    """Read the next batch of each member, on the devices of a mesh, [members, ...].

    If there are several steps, it is [members, steps, ...].
    """
    batches = [feeding.stack_steps([next(each) for _ in range(steps)]) for each in iterators]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *_fill(batches, mesh))
    return parallel.place_local(stacked, mesh, _MEMBERS)


def stack_hyperparameters(configs: Sequence[Config], mesh: Mesh) -> dict[str, jax.Array]:
    """Stack the fields of the training step in which the configs differ, by their names."""
    flat = [dict(config_lib.flatten(config)) for config in configs]
    varied = {}
    for field in options.TRACED_BY_STEP:
        column: list[Any] = [fields[field] for fields in flat]
        if len(set(column)) == 1:
            continue
        if field == "optimizer.schedule":
            column = [SCHEDULES.index(name) for name in column]
        if field == "optimizer.max_gradient_norm":
            column = [norm or math.inf for norm in column]
        dtype = jnp.int32 if isinstance(column[0], int) else jnp.float32
        varied[field] = stack([jnp.asarray(value, dtype) for value in column], mesh)
    return varied


def _fill(members: Sequence[T], mesh: Mesh) -> list[T]:
    """Append copies of the first member, to the same number of members on each device."""
    return [*members, *[members[0]] * (-len(members) % mesh.size)]


def make_population_step(
    config: Config, model: model_lib.LanguageModel, total_steps: int, mesh: Mesh
) -> TrainMembers:
    """Make a training step of all members, from their hyperparameters, states and batches.

    `config` is that of any member; `total_steps` is the number of steps of all epochs.
    """

    def step(traced: dict[str, jax.Array], state: TrainState, batch: Batch) -> TrainState:
        member: Any = config
        for field, array in traced.items():
            section, _, name = field.partition(".")
            changed = dataclasses.replace(getattr(member, section), **{name: array})
            member = dataclasses.replace(member, **{section: changed})
        learning_rate = _make_schedule(member.optimizer, total_steps)
        optimizer = optimizer_lib.chain_updates(member.optimizer, learning_rate)
        train_step = make_step(model, optimizer, member, None)
        return feeding.scan_steps(train_step, config.batches.window_length)(state, batch)

    return _map_members(step, mesh)


def _make_schedule(optimizer: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Make the learning rate; `schedule` is an index into `SCHEDULES` if members differ in it."""
    schedule: Any = optimizer.schedule
    if isinstance(schedule, str):
        return optimizer_lib.make_schedule(optimizer, total_steps)
    schedules = [
        optimizer_lib.make_schedule(dataclasses.replace(optimizer, schedule=name), total_steps)
        for name in SCHEDULES
    ]
    return lambda count: jnp.stack([each(count) for each in schedules])[schedule]


def make_compute_losses(model: model_lib.LanguageModel, mesh: Mesh) -> ComputeLosses:
    """Make `loss.compute_loss` of all members."""
    read_all = _map_members(
        lambda params, carry, chunk: loss_lib.read_chunk(model, params, chunk, carry), mesh
    )

    def compute_losses(params: model_lib.Params, ids: Ids) -> list[float]:
        number = len(jax.tree.leaves(params)[0])
        carry = stack([model.initial_carry(loss_lib.count_streams(ids))] * number, mesh)
        total = np.zeros(number)
        for chunk in loss_lib.iterate_chunks(ids):
            replicated = tuple(np.broadcast_to(array, (number, *array.shape)) for array in chunk)
            losses, carry = read_all(params, carry, replicated)
            total += np.asarray(losses).sum(axis=(1, 2), dtype=np.float64)
        return [float(loss) for loss in total / (len(ids) - 1)]

    return compute_losses


def _map_members(function: Callable[..., Any], mesh: Mesh) -> Any:
    """Map a function over all members, and jit it; the second argument is donated."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def on_one_device(*arguments: Any) -> Any:
        if on_cpu:
            return jax.lax.map(lambda each: function(*each), arguments)
        return jax.vmap(function)(*arguments)

    divided = parallel.shard_map(on_one_device, mesh=mesh, in_specs=_MEMBERS, out_specs=_MEMBERS)
    return jax.jit(divided, donate_argnums=1)
