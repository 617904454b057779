"""Train many models at once in one compiled program, each as if it were trained alone.

Each member is an open run of its own, with a config, a working directory and checkpoints. They
share the text and one training loop, whose state is that of all members (`stacked`).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.config import Config
from lstm_jax.data import texts
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import cell_file, resume, workdir
from lstm_jax.run.loop import Loop, Observer
from lstm_jax.run.metrics import Row
from lstm_jax.run.plan import cut_validation
from lstm_jax.run.progress import Clock
from lstm_jax.run.session import Session, open_run
from lstm_jax.run.signals import Pacer
from lstm_jax.sweep import options, stacked

# Called with the number of a member and each row of its metrics.
_Watch = Callable[[int, Row], object]


@dataclasses.dataclass
class _Member:
    """A model in training. Once `reason` is set, it has failed, and no more is written."""

    run: Session
    reason: str = ""


def train_population(
    configs: Sequence[Config], directories: Sequence[Path], watch: _Watch
) -> list[str]:
    """Train a model for each config, or resume from the working directories.

    Each working directory is that of a single run, but without samples and curves. Return the
    reason why each model failed, or "". Raise `UserError` as `training.train` does.
    """
    configs = check_members(configs)
    splits = texts.load_texts(configs[0].data)
    with contextlib.ExitStack() as opened:
        members = []
        for number, (config, directory) in enumerate(zip(configs, directories, strict=True)):
            names = (workdir.CONFIG, workdir.CHECKPOINTS)
            is_resumed = any((directory / name).exists() for name in names)
            watch_one = functools.partial(watch, number)
            try:
                run = open_run(config, directory, watch=watch_one, splits=splits)
                members.append(_Member(opened.enter_context(run)))
            except UserError as error:
                if not is_resumed:
                    raise
                # The user can repair that member, and the others have not failed.
                raise UnavailableError(
                    f"can't resume the training in {directory}: {error}"
                ) from None
        # Members that were killed at different epochs are trained in groups.
        groups: dict[tuple[bool, int], list[_Member]] = {}
        for member in members:
            groups.setdefault((member.run.is_finished, member.run.loop.step), []).append(member)
        for _, group in sorted(groups.items()):
            _train_group(group)
    return [member.reason for member in members]


def check_members(configs: Sequence[Config]) -> list[Config]:
    """Return the configs with the checksum of the cell's file.

    Raise `UserError` if one program can't train them together.
    """
    rules = {
        "init_from": "start from fresh weights",
        "patience": "all end at the same step",
        "distill.teachers": "learn from the text alone",
    }
    fields = dict(config_lib.flatten(configs[0]))
    for field, rule in rules.items():
        if fields[field]:
            raise UserError(
                f"the members of a population {rule}: leave out --config.{field}, or train one at "
                "a time with --population=1"
            )
    configs = [
        dataclasses.replace(config, model=cell_file.resolve_cell(config.model))
        for config in configs
    ]
    resume.resolve_model(configs[0])
    first = dict(config_lib.flatten(configs[0]))
    for config in configs[1:]:
        for field, value in config_lib.flatten(config):
            if value != first[field] and field not in options.TRACEABLE:
                raise UserError(
                    f"the members of a population can't differ in config.{field}, which is "
                    f"{first[field]!r} and {value!r}: leave out --population, or vary only "
                    f"{', '.join(options.TRACEABLE)}"
                )
    return configs


def _train_group(members: Sequence[_Member]) -> None:
    """Train members that are at the same step, and measure them on the test split."""
    first = members[0].run
    config, plan, mesh = first.config, first.plan, stacked.make_mesh(len(members))
    compute_losses = stacked.make_compute_losses(first.model, mesh)
    if not first.is_finished:
        state = stacked.stack_states([member.run.loop.state for member in members], mesh)
        loop = Loop(state, first.loop.step, plan.total_steps)
        traced = stacked.stack_hyperparameters([member.run.config for member in members], mesh)
        train_step = stacked.make_population_step(config, first.model, plan.total_steps, mesh)
        clock = Clock(loop.step)
        validate = _Validate(members, clock, compute_losses)
        observers = [Pacer(loop.step), clock, _Log(members, clock), validate]
        iterators = [member.run.iterator for member in members]
        next_batch = functools.partial(stacked.read_batches, iterators, mesh)
        train_members = functools.partial(train_step, traced)
        training.take_steps(loop, train_members, next_batch, plan, observers)
    for member in members:
        member.run.checkpoints.wait()
    best = [member.run.load_best(member.run.read_metrics()) for member in members]
    if all(measured is not None for *_, measured in best):
        return
    losses = compute_losses(stacked.stack([params for params, *_ in best], mesh), first.ids["test"])
    for member, (_, step, measured), loss in zip(members, best, losses, strict=False):
        if measured is None and math.isfinite(loss) and not member.reason:
            member.run.record(step, "test", loss)


@dataclasses.dataclass
class _Log(Observer):
    """Fails members with numbers that are not finite, and records losses of the others."""

    members: Sequence[_Member]
    clock: Clock

    def after_step(self, loop: Loop) -> None:
        """Check the members before each row of metrics and each validation."""
        run, state = self.members[0].run, loop.state
        logs = loop.step % run.config.log_every_steps == 0
        if not logs and not run.plan.validates_at(loop.step):
            return
        sums = state.loss_sum, state.norm_sum, state.loss_steps
        arrays = [*map(np.asarray, (*sums, state.skipped, state.first_skipped))]
        speed = self.clock.steps_per_second(loop.step) * run.plan.tokens_per_step if logs else 0.0
        for member, loss, norm, number, skipped, bad in zip(self.members, *arrays, strict=False):
            if skipped > member.run.config.max_skipped_steps and not member.reason:
                member.reason = f"a parameter, the loss or a gradient of step {bad} is not finite"
            if logs and number and not member.reason:
                means = float(loss / number), float(norm / number)
                member.run.record_training(loop.step, *means, int(skipped), speed)
        if logs:
            loop.state = state.clear("loss_sum", "norm_sum", "loss_steps")


@dataclasses.dataclass
class _Validate(Observer):
    """Saves a checkpoint of each member that has not failed, and measures the validation losses."""

    members: Sequence[_Member]
    clock: Clock
    compute_losses: stacked.ComputeLosses

    def before_first_step(self, loop: Loop) -> None:
        """Validate, because checkpoints are saved only where it is due."""
        self._validate(loop)

    def after_step(self, loop: Loop) -> None:
        """Save and validate if it is due."""
        if not self.members[0].run.plan.validates_at(loop.step):
            return
        for member, state in zip(self.members, stacked.unstack_states(loop.state), strict=False):
            if member.run.loop.state.average is None:
                state = state._replace(average=None)
            if not member.reason:
                member.run.save(loop.step, state)
        self._validate(loop)

    def _validate(self, loop: Loop) -> None:
        first = self.members[0].run
        losses = self.compute_losses(loop.state.evaluated, cut_validation(first.config, first.ids))
        for member, loss in zip(self.members, losses, strict=False):
            if not member.reason:
                member.run.record(loop.step, "validation", loss)
                member.run.checkpoints.record_validation(loop.step, loss)
        self.clock.start_clock(loop.step)
