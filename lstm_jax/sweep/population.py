"""Train many models at once in one compiled program, each as if it were trained alone.

The members of a population differ in config fields that the program reads as arrays. They are
divided over the devices. A CPU has a device per core, which computes its members one after the
other, because XLA's CPU backend is slow at batched matmuls. A GPU or TPU computes its members
together, under `jax.vmap`.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lstm_jax import batches
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.config import Config, RegularizationConfig
from lstm_jax.data import texts
from lstm_jax.devices import parallel
from lstm_jax.devices.memory import keep_freed_memory
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import cell_file, lock, resume, workdir
from lstm_jax.run import checkpoints as checkpoints_lib
from lstm_jax.run.metrics import MetricsWriter
from lstm_jax.run.plan import cut_validation
from lstm_jax.train_step import TrainState, make_step
from lstm_jax.vocabulary import Costs, Ids

# Fields in which members may differ: the compiled step reads them as arrays, or only the initial
# parameters and the order of the text depend on them.
_OF_OPTIMIZER = (
    *("b1", "b2", "epsilon", "momentum", "learning_rate", "warmup_steps", "schedule"),
    *("weight_decay", "max_gradient_norm", "average_decay"),
)
TRACED_BY_STEP = (
    *(f"optimizer.{name}" for name in _OF_OPTIMIZER),
    *(f"regularization.{field.name}" for field in dataclasses.fields(RegularizationConfig)),
)
TRACEABLE = ("seed", "model.initial_embedding", "model.initial_scale", *TRACED_BY_STEP)

# The largest default size of a population of seeds.
LARGEST = 16

_MEMBERS = PartitionSpec("members")

# Called with the number of a member, the epoch and the validation loss.
_OnValidation = Callable[[int, int, float], None]


@dataclasses.dataclass
class _Member:
    """A model in training. Once `reason` is set, it has failed, and no more is written."""

    number: int
    config: Config
    directory: Path
    start: resume.Start
    checkpoints: checkpoints_lib.CheckpointWriter
    check_lock: Callable[[], None]
    metrics: MetricsWriter = dataclasses.field(init=False)  # Open while it is trained.
    reason: str = ""


def train_population(
    configs: Sequence[Config], directories: Sequence[Path], on_validation: _OnValidation
) -> list[str]:
    """Train a model for each config, or resume from the working directories.

    Each working directory is that of a single run, but without samples and curves. Return the
    reason why each model failed, or "". Raise `UserError` as `training.train` does.
    """
    configs = check_members(configs)
    keep_freed_memory()
    splits = texts.load_texts(configs[0].data)
    text = splits.texts["train"]
    make_vocabulary = functools.cache(lambda: text.vocabulary(configs[0].data))
    ids: dict[str, Ids] = {}
    costs: dict[str, Costs] = {}
    members: list[_Member] = []
    with contextlib.ExitStack() as held:
        for config, directory in zip(configs, directories, strict=True):
            check_lock = held.enter_context(lock.hold_lock(directory))
            with _naming_resumed(directory):
                config = dataclasses.replace(config, data=splits.settle(config.data))
                settled = resume.settle_run(config, directory, make_vocabulary)
                ids = ids or splits.encode(settled.vocabulary)
                costs = costs or splits.measure_costs(settled.vocabulary)
                start = resume.restore_run(settled, directory, ids["train"], text.count_tokens)
                saved_in = directory / workdir.CHECKPOINTS
                writer = held.enter_context(checkpoints_lib.CheckpointWriter(saved_in))
                if start.history is None:
                    # Save before any metrics: metrics without a checkpoint can't be resumed.
                    state, sizes = start.state, workdir.history_sizes(directory)
                    writer.save(0, state.evaluated, state.rest, start.iterator, sizes)
                    writer.wait()
                else:
                    workdir.restore_history(directory, start.history)
            number, own = len(members), settled.config
            members.append(_Member(number, own, directory, start, writer, check_lock))
        # Members that were killed at different epochs are trained in groups.
        for step in sorted({member.start.step for member in members}):
            group = [member for member in members if member.start.step == step]
            for member in group:
                path = member.directory / workdir.METRICS
                member.metrics = held.enter_context(MetricsWriter(path, step, member.config))
            _train_group(group, ids, costs, on_validation)
    return [member.reason for member in members]


@contextlib.contextmanager
def _naming_resumed(directory: Path) -> Iterator[None]:
    """Convert a `UserError` about a resumed member to an `UnavailableError` that names it.

    The user can repair that member, and the others have not failed.
    """
    is_resumed = any((directory / name).exists() for name in (workdir.CONFIG, workdir.CHECKPOINTS))
    try:
        yield
    except UserError as error:
        if not is_resumed:
            raise
        raise UnavailableError(f"can't resume the training in {directory}: {error}") from None


def check_members(configs: Sequence[Config]) -> list[Config]:
    """Return the configs with the checksum of the cell's file.

    Raise `UserError` if one program can't train them together.
    """
    if configs[0].init_from:
        raise UserError(
            "the members of a population start from fresh weights: leave out "
            "--config.init_from, or train one at a time with --population=1"
        )
    if configs[0].patience:
        raise UserError(
            "the members of a population all end at the same step: leave out --config.patience, or "
            "train one at a time with --population=1"
        )
    configs = [
        dataclasses.replace(config, model=cell_file.settle_cell(config.model)) for config in configs
    ]
    resume.settle_model(configs[0])
    first = dict(config_lib.flatten(configs[0]))
    for config in configs[1:]:
        for field, value in config_lib.flatten(config):
            if value != first[field] and field not in TRACEABLE:
                raise UserError(
                    f"the members of a population can't differ in config.{field}, which is "
                    f"{first[field]!r} and {value!r}: leave out --population, or vary only "
                    f"{', '.join(TRACEABLE)}"
                )
    return configs


def make_mesh(members: int) -> Mesh:
    """Return the devices that members are divided over, along the axis "members"."""
    return Mesh(np.array(jax.devices()[:members]), ("members",))


def _map_members(function: Callable[..., Any], mesh: Mesh) -> Any:
    """Map a function over all members, and jit it; the second argument is donated."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def on_one_device(*arguments: Any) -> Any:
        if on_cpu:
            return jax.lax.map(lambda each: function(*each), arguments)
        return jax.vmap(function)(*arguments)

    divided = parallel.shard_map(on_one_device, mesh=mesh, in_specs=_MEMBERS, out_specs=_MEMBERS)
    return jax.jit(divided, donate_argnums=1)


def hyperparameters(configs: Sequence[Config]) -> dict[str, jax.Array]:
    """Return the fields of the training step in which the configs differ, [members] each."""
    flat = [dict(config_lib.flatten(config)) for config in configs]
    varied = {}
    for field in TRACED_BY_STEP:
        column: list[Any] = [fields[field] for fields in flat]
        if len(set(column)) > 1:
            if isinstance(column[0], str):
                column = [optimizer_lib.SCHEDULES.index(name) for name in column]
            dtype = jnp.int32 if isinstance(column[0], int) else jnp.float32
            varied[field] = jnp.asarray(column, dtype)
    return varied


def make_population_step(
    config: Config, vocabulary_size: int, total_steps: int, mesh: Mesh
) -> Callable[[dict[str, jax.Array], TrainState, batches.Batch], TrainState]:
    """Make a training step of all members, from their `hyperparameters`, states and batches.

    `config` is that of any member; `total_steps` is the number of steps of all epochs.
    """

    def step(traced: dict[str, jax.Array], state: TrainState, batch: batches.Batch) -> TrainState:
        by_section: dict[str, dict[str, Any]] = {"optimizer": {}, "regularization": {}}
        for field, array in traced.items():
            section, _, name = field.partition(".")
            by_section[section][name] = array
        own = dataclasses.replace(
            config,
            optimizer=dataclasses.replace(config.optimizer, **by_section["optimizer"]),
            regularization=dataclasses.replace(
                config.regularization, **by_section["regularization"]
            ),
        )
        model = model_lib.make_model(config.model, vocabulary_size)
        optimizer = optimizer_lib.make_optimizer(own.optimizer, total_steps)
        return make_step(model, optimizer, own, None)(state, batch)

    return _map_members(step, mesh)


def stack(members: Sequence[object], mesh: Mesh) -> Any:
    """Stack the arrays of all members, [members, ...], on the devices of a mesh."""
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)
    return parallel.place(stacked, mesh, _MEMBERS)


def _train_group(
    members: Sequence[_Member],
    ids: dict[str, Ids],
    costs: dict[str, Costs],
    on_validation: _OnValidation,
) -> None:
    """Train members that are at the same step; see `train_population`."""
    config, first = members[0].config, members[0].start
    step, total_steps = first.step, first.plan.total_steps
    mesh = make_mesh(len(members))

    def fill(each: list[Any]) -> list[Any]:
        """Pad with copies of the first member, to the same number of members on each device."""
        return each + each[:1] * (-len(each) % mesh.size)

    states = [member.start.state for member in members]
    if any(optimizer_lib.has_average(member.config.optimizer) for member in members):
        states = [state._replace(average=state.evaluated) for state in states]
    state = stack(fill(states), mesh)
    traced = hyperparameters(fill([member.config for member in members]))
    traced = parallel.place(traced, mesh, _MEMBERS)
    train_step = make_population_step(config, first.model.vocabulary_size, total_steps, mesh)
    compute_losses = _make_compute_losses(first.model, mesh)
    tokens_per_step = config.batches.batch_size * config.batches.window_length
    validation = cut_validation(config, ids)
    clock, timed = time.monotonic(), step  # From when, and which step, the speed is measured.

    def record(member: _Member, step: int, split: str, loss: float, **extra: Any) -> None:
        if split != "train":
            bits = loss_lib.compute_bits_per_character(loss, [costs[split]])
            extra["bits_per_character"] = bits
        member.metrics.write(step, first.plan.count_epochs(step), split, loss, **extra)

    def validate() -> None:
        losses = compute_losses(state.evaluated, validation)
        for member, loss in zip(members, losses, strict=False):
            if not member.reason:
                record(member, step, "validation", loss)
                member.checkpoints.record_validation(step, loss)
                if step % first.plan.steps_per_epoch == 0:
                    on_validation(member.number, step // first.plan.steps_per_epoch, loss)

    validate()
    while step < total_steps:
        parts = fill([next(member.start.iterator) for member in members])
        state = train_step(traced, state, jax.tree.map(lambda *arrays: np.stack(arrays), *parts))
        step += 1
        if step == first.step + 1:  # The first call compiled it.
            jax.block_until_ready(state.loss_sum)
            clock, timed = time.monotonic(), step
        logs, validates = step % config.log_every_steps == 0, first.plan.validates_at(step)
        if logs or validates:
            skipped, bad = np.asarray(state.skipped), np.asarray(state.first_skipped)
            for i, member in enumerate(members):
                if skipped[i] > member.config.max_skipped_steps and not member.reason:
                    member.reason = (
                        f"a parameter, the loss or a gradient of step {bad[i]} is not finite"
                    )
        if logs:
            now = time.monotonic()
            speed: dict[str, Any] = {}
            if step > timed:
                tokens = (step - timed) * tokens_per_step
                speed["tokens_per_second"] = round(tokens / (now - clock))
            clock, timed = now, step
            measured = state.loss_sum, state.norm_sum, state.loss_steps
            sums, norms, counts = map(np.asarray, measured)
            for i, member in enumerate(members):
                if counts[i] and not member.reason:
                    record(
                        *(member, step, "train", float(sums[i] / counts[i])),
                        learning_rate=member.start.plan.get_learning_rate(step, int(skipped[i])),
                        gradient_norm=float(norms[i] / counts[i]),
                        **speed,
                    )
            loss_sum, norm_sum, loss_steps = map(jnp.zeros_like, measured)
            state = state._replace(loss_sum=loss_sum, norm_sum=norm_sum, loss_steps=loss_steps)
        if validates:
            _save(members, state, step)
            validate()
            clock, timed = time.monotonic(), step
    for member in members:
        member.checkpoints.wait()
    batch_size = config.batches.batch_size
    best = [workdir.load_params(member.directory, first.model, batch_size) for member in members]
    losses = compute_losses(stack(fill([params for params, _ in best]), mesh), ids["test"])
    for member, (_, at), loss in zip(members, best, losses, strict=False):
        if math.isfinite(loss) and not member.reason:
            record(member, at, "test", loss)


def _save(members: Sequence[_Member], state: TrainState, step: int) -> None:
    """Save a checkpoint of each member that has not failed."""
    arrays = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    for i, member in enumerate(members):
        if member.reason:
            continue
        member.check_lock()
        own = jax.tree.map(lambda array, i=i: jnp.asarray(array[i]), arrays)
        own = own._replace(key=jax.random.wrap_key_data(own.key))
        if not optimizer_lib.has_average(member.config.optimizer):
            own = own._replace(average=None)
        sizes = workdir.history_sizes(member.directory)
        member.checkpoints.save(step, own.evaluated, own.rest, member.start.iterator, sizes)


def _make_compute_losses(
    model: model_lib.LanguageModel, mesh: Mesh
) -> Callable[[model_lib.Params, Ids], list[float]]:
    """Make `loss.compute_loss` of all members, from their parameters [members, ...] and ids."""
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
