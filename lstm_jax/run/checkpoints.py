"""Save and restore checkpoints: written in the background, atomic, sealed with checksums.

A checkpoint is a directory named by its step. Orbax writes its arrays; SHA256SUMS holds the
checksum of each file (`sha256sum -c SHA256SUMS` verifies them too).
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import shutil
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lstm_jax import model as model_lib
from lstm_jax.data import files
from lstm_jax.devices import hosts
from lstm_jax.errors import UnavailableError, UserError, one_line, warn
from lstm_jax.model import Params
from lstm_jax.run.seal import VALIDATION, find_damage, seal_checkpoint

_UNFINISHED = ".unfinished"
# Where Orbax makes directories in the background, the threads of a save signal each other under a
# number that is the latest of the whole process. If two runs in one process save at the same time,
# a thread may thus wait for a directory of the other run.
# So they are made before `save` returns, and nothing is signalled.
_OPTIONS = ocp.options.AsyncOptions(create_directories_asynchronously=False)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    names = [record.pathname, *(frame.filename for frame in traceback.extract_tb(trace))]
    return not any(name.startswith(_ORBAX) for name in names)


# The threads of a save log every exception with its traceback; `CheckpointWriter` raises it.
_ORBAX = str(Path(ocp.__file__).parent)
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_of_orbax)


def _make_handler() -> ocp.CompositeCheckpointHandler:
    """Return the handler of a save: each array is a directory, which `seal` can check."""
    items = {name: ocp.StandardCheckpointHandler(use_ocdbt=False) for name in ("params", "state")}
    return ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=_OPTIONS),
        handler_registry=ocp.handlers.create_default_handler_registry(**items),
    )


class CheckpointWriter(contextlib.AbstractContextManager["CheckpointWriter", None]):
    """Saves the checkpoints of a run; keeps the latest two and the best by validation loss.

    Only the processes of one run may use it, one of which holds the lock of the working directory.
    All of them call the same methods in the same order.
    """

    # Orbax's CheckpointManager with LatestN and BestN would break three guarantees: SHA256SUMS is
    # written before a checkpoint gets its name, the validation loss is added after the save, and a
    # checkpoint is renamed before its files are removed, so that a reader never sees half of it.
    # Each save adds about 30 KiB to the process: TensorStore 0.1.86 leaks the results of its
    # `to_json` and `experimental_collect_matching_metrics`, which Orbax calls.

    def __init__(self, directory: Path) -> None:
        """Make the directory and remove unfinished checkpoints of killed processes.

        Raise `UserError` if anything else has the name of a checkpoint.
        """
        self._directory = directory.resolve()
        if hosts.is_first():
            self._directory.mkdir(exist_ok=True)
            self._clear()
        hosts.wait_for_all("checkpoints")
        self._orbax = ocp.AsyncCheckpointer(_make_handler(), async_options=_OPTIONS)
        self._thread = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future[None]] | None = None

    def _clear(self) -> None:
        known = {str(step) for step in list_steps(self._directory)}
        for path in sorted(self._directory.iterdir()):
            unfinished = _UNFINISHED in path.name
            if unfinished and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # A reader may have a file of it open.
            elif unfinished or (path.name.isdecimal() and path.name not in known):
                raise UserError(f"{path} is not a checkpoint: move it away")

    def save(
        self, step: int, params: Params, state: Mapping[str, object], history: Mapping[str, int]
    ) -> None:
        """Start saving a checkpoint after `step` training steps; its arrays may then be donated.

        `state` is all of the training state but `params`, and `history` holds the sizes of the
        files that the run appends to. Raise `UnavailableError` if this checkpoint, or the one
        before, can't be written.
        """
        self.wait()
        path = self._directory / f"{step}{_UNFINISHED}"
        try:
            self._orbax.save(
                path,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    state=ocp.args.StandardSave(state),
                    history=ocp.args.JsonSave(dict(history)),
                ),
            )
        except Exception as error:  # Orbax re-raises any exception of its storage.
            raise self._failed(step, error) from None
        self._saving = step, self._thread.submit(self._finish, path, step)

    def _finish(self, path: Path, step: int) -> None:
        self._orbax.wait_until_finished()
        if not hosts.is_first():
            return
        seal_checkpoint(path)
        path.rename(self._directory / str(step))
        files.sync_directory(self._directory)
        steps = list_steps(self._directory)
        for old in set(steps) - {*steps[-2:], find_best_step(self._directory)}:
            unfinished = self._directory / f"{old}{_UNFINISHED}"
            (self._directory / str(old)).rename(unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)  # If it fails, `_clear` tries again.

    def record_validation(self, step: int, loss: float) -> None:
        """Add the validation loss, in nats per token, to the checkpoint of `step`."""
        self.wait()
        files.write_json(self._directory / str(step) / VALIDATION, {"loss": loss})

    def check(self) -> bool:
        """Return whether a save is in progress; raise `UnavailableError` if one has failed."""
        if self._saving and self._saving[1].done():
            self.wait()
        return self._saving is not None

    def wait(self) -> None:
        """Wait until the last save is finished; raise `UnavailableError` if it has failed."""
        if self._saving:
            step, future = self._saving
            self._saving = None
            try:
                future.result()
            except Exception as error:
                raise self._failed(step, error) from None

    def _failed(self, step: int, error: Exception) -> UnavailableError:
        """Remove an incomplete checkpoint; return the error to raise."""
        for remains in self._directory.glob(f"{step}{_UNFINISHED}*"):
            shutil.rmtree(remains, ignore_errors=True)
        last = list_steps(self._directory)
        before = f"the last good one is step {last[-1]}" if last else "there is none before it"
        verb = "resume from there" if last else "start again"
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        return UnavailableError(
            f"can't write the checkpoint of step {step} in {self._directory} "
            f"({reason}); {before}: free space or make it writable, then {verb} with "
            f"the same command"
        )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # `wait` has raised it already.
                self._orbax.close()
            with contextlib.suppress(OSError):  # TensorStore makes it again if the run was moved.
                self._directory.rmdir()


def restore_latest(
    directory: Path, params: Params, state: Mapping[str, object]
) -> tuple[int, Any] | None:
    """Return the step of the latest undamaged checkpoint, and its `params`, `state` and `history`.

    Return None if there is no checkpoint. Later ones, which are damaged, are renamed, each with a
    warning. `params` and `state` are arrays of the expected shapes and dtypes, or
    `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: if all are damaged, or one does not hold such `params` and `state`.
    """
    step, restored, damaged = _restore_first(
        directory,
        lambda step: (step, 0),  # The latest one has the highest rank.
        params,
        state=ocp.args.StandardRestore(_abstract(state)),
        history=ocp.args.JsonRestore(),
    )
    if step is None:
        return None
    for path, damage in damaged.items() if hosts.is_first() else ():
        ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        names = (path.with_name(f"{path.name}.damaged{end}") for end in ends)
        path.rename(aside := next(name for name in names if not os.path.lexists(name)))
        warn(f"{path} is damaged ({damage}): it is now {aside.name}")
    return step, restored


def restore_best_params(directory: Path, params: Params) -> tuple[Params, int]:
    """Return the parameters of the best undamaged checkpoint by validation loss, and its step.

    If none has a validation loss, it is the latest. Nothing is written, and the run may save
    checkpoints at the same time. Each damaged checkpoint is reported with a warning. `params` are
    arrays of the expected shapes and dtypes, or `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: if there is none, all are damaged, or one does not hold such `params`.
    """
    rank = functools.partial(_rank, directory)
    step, restored, damaged = _restore_first(directory, rank, params)
    if step is None:
        raise UserError(f"there is no checkpoint in {directory} yet: train first")
    for path, damage in damaged.items():
        warn(f"{path} is damaged ({damage}): another checkpoint is read")
    return restored.params, step


def list_steps(directory: Path) -> list[int]:
    """Return the steps of all checkpoints in order, without links and numbers beyond int32."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    numbers = [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name)]
    return sorted(number for number in numbers if number < 2**31)


def find_best_step(directory: Path) -> int | None:
    """Return the step with the best validation loss, else the latest, else None."""
    return max(list_steps(directory), key=functools.partial(_rank, directory), default=None)


def _rank(directory: Path, step: int) -> tuple[float, int]:
    """Return a pair of numbers that is greatest for the best checkpoint."""
    loss = read_validation_loss(directory, step)
    return (-np.inf, step) if loss is None else (-loss, 0)


def read_validation_loss(directory: Path, step: int) -> float | None:
    """Return the validation loss of a checkpoint; None if it has no valid one."""
    try:
        loss = files.read_json(directory / str(step) / VALIDATION)["loss"]
    except (OSError, ValueError, KeyError):
        return None
    return loss if isinstance(loss, float) and np.isfinite(loss) else None


def _restore_first(
    directory: Path, rank: Callable[[int], tuple[float, int]], params: Params, **other_items: object
) -> tuple[int | None, Any, dict[Path, str]]:
    """Return step and items of the highest-ranked undamaged checkpoint; None if there is none.

    The last item describes the damage of those ranked higher. Raise `UserError` if all are damaged,
    or one does not hold arrays of these names, shapes and dtypes.
    """
    items = {"params": ocp.args.StandardRestore(_abstract(params)), **other_items}
    damaged: dict[Path, str] = {}
    while steps := [s for s in list_steps(directory) if directory / str(s) not in damaged]:
        step = max(steps, key=rank)
        path = directory / str(step)
        damage = find_damage(path)
        if damage is None:
            restored = _restore_items(path, items)
            if restored is None:
                continue
            damage = _find_disagreement(restored, step)
        if damage is None:
            return step, restored, damaged
        if path.exists():  # Otherwise the run has replaced it by a newer one.
            damaged[path] = damage
    if damaged:
        reasons = "; ".join(f"step {path.name}: {damage}" for path, damage in damaged.items())
        raise UserError(
            f"every checkpoint in {directory} is damaged ({reasons}): restore one from a copy, or "
            f"use another working directory"
        )
    return None, None, damaged


def _restore_items(path: Path, items: Mapping[str, object]) -> Any:
    """Return the items of a checkpoint; None if the run has just removed it.

    Raise `UserError` if it does not hold arrays of these names, shapes and dtypes.
    """
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path.resolve(), args=ocp.args.Composite(**items))
        for name in {"params", "state"} & items.keys():
            # Orbax restores None for an array that was None, or masked, when it was saved.
            if None in jax.tree.leaves(restored[name], is_leaf=lambda leaf: leaf is None):
                raise ValueError(f"an array of {name} is missing")
        return restored
    except jax.errors.JaxRuntimeError:  # Too little memory, or a lost process.
        raise
    except Exception as error:  # Orbax re-raises any exception of its storage.
        if not path.exists():
            return None
        differing = _compare_names(path, "state", items)
        if differing and not _compare_names(path, "params", items):
            raise UserError(
                f"the training state in {path} {differing}, unlike that of this code: use the code "
                "that saved it, or start a new run with its parameters "
                f"(--init_from {path.parents[1]})"
            ) from None
        raise UserError(
            f"the checkpoint {path} does not hold the model that the config describes: "
            f"{one_line(error)[:300]}"
        ) from None


def _compare_names(path: Path, item: str, items: Mapping[str, Any]) -> str:
    """Say which array an item of a checkpoint has in addition, or lacks; "" if neither."""
    if item not in items:
        return ""
    saved = {array.parent.name for array in (path / item).glob("*/.zarray")}
    leaves = jax.tree.leaves_with_path(items[item].item)
    expected = {jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in leaves}
    names = sorted(saved ^ expected)
    return f"{'has' if names[0] in saved else 'lacks'} {names[0]}" if names else ""


# Jitted, so that it works on arrays that are divided over processes.
_is_finite = jax.jit(model_lib.is_finite)


def _find_disagreement(restored: ocp.args.Composite, step: int) -> str | None:
    """Return what is wrong with restored items, or None."""
    state, history = restored.get("state"), restored.get("history", {})
    saved = int(state.get("step", step)) if isinstance(state, dict) else step
    if saved != step:
        return f"it is the checkpoint of step {saved}"
    if not _is_finite(restored.params):
        return "its parameters are not finite"
    sizes = history.values() if isinstance(history, dict) else [None]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return "it has no sizes in its history"
    return None


def _abstract(tree: Any) -> Any:
    """Return shapes, dtypes and shardings; the default is this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or first), tree
    )
