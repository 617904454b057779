"""Checkpoints: written beside the training, whole or not there at all, sealed with checksums.

A checkpoint is a directory named by its step. Orbax writes its arrays and the position in the
text; SHA256SUMS holds the checksum of each file (`sha256sum -c SHA256SUMS` checks them too).
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from lstm_jax import files, hosts
from lstm_jax.errors import UserError, one_line

SEAL = "SHA256SUMS"
# Measured after the checkpoint is sealed, so its checksum does not cover it.
VALIDATION = "validation.json"
_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"


class CheckpointWriter:
    """Saves the checkpoints of a run; kept are the latest two and the best by validation loss.

    It is to be used by the processes of one run only, of which one holds the lock of the working
    directory; all call the same methods in the same order.
    """

    def __init__(self, directory: Path) -> None:
        """Makes the directory and clears away what a killed process left half-done in it."""
        self._directory = directory.absolute()
        with hosts.first_goes_ahead("checkpoints"):
            if hosts.is_first():
                self._directory.mkdir(exist_ok=True)
                for leftover in self._directory.glob(f"*{_UNFINISHED}*"):
                    shutil.rmtree(leftover)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future[None]] | None = None

    def save(
        self,
        step: int,
        params: Any,
        state: Any,
        iterator: grain.DatasetIterator,
        history: Mapping[str, int],
    ) -> None:
        """Starts to save a checkpoint; the arrays may be donated as soon as this returns.

        Args:
          step: training steps done.
          params: the model's parameters.
          state: every other array that training goes on from.
          iterator: of the training batches.
          history: the sizes of the files that the run appends to.

        Raises:
          UserError: if it, or the one before, can't be written.
        """
        self.wait()
        path = self._directory / f"{step}{_UNFINISHED}"
        try:
            self._orbax.save(
                path,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    state=ocp.args.StandardSave(state),
                    batches=ocp.args.JsonSave(iterator.get_state()),
                    history=ocp.args.JsonSave(dict(history)),
                ),
            )
        except Exception as error:  # Orbax hands on what the layers below it raise.
            raise self._failed(step, error) from None
        self._saving = step, self._thread.submit(self._finish, path, step)

    def _finish(self, path: Path, step: int) -> None:
        self._orbax.wait_until_finished()
        if not hosts.is_first():
            return
        seal(path)
        path.rename(self._directory / str(step))
        files.sync_directory(self._directory)
        kept = {*steps(self._directory)[-2:], best_step(self._directory)}
        for old in set(steps(self._directory)) - kept:
            # A reader finds a checkpoint whole or not at all, also while it goes.
            doomed = self._directory / f"{old}{_UNFINISHED}"
            (self._directory / str(old)).rename(doomed)
            shutil.rmtree(doomed)

    def record_validation(self, step: int, loss: float) -> None:
        """Adds the validation loss, in nats per token, to the checkpoint of `step`."""
        self.wait()
        files.write_json(self._directory / str(step) / VALIDATION, {"loss": loss})

    def check(self) -> bool:
        """Whether a checkpoint is still being written; raises `UserError` if one could not be."""
        if self._saving and self._saving[1].done():
            self.wait()
        return self._saving is not None

    def wait(self) -> None:
        """Waits until all is written; raises `UserError` if it can't be."""
        if self._saving:
            step, future = self._saving
            try:
                future.result()
            except Exception as error:
                self._saving = None
                raise self._failed(step, error) from None
            self._saving = None

    def _failed(self, step: int, error: Exception) -> UserError:
        """What to tell of a checkpoint that can't be written, whose remains are cleared away."""
        for remains in self._directory.glob(f"{step}{_UNFINISHED}*"):
            shutil.rmtree(remains, ignore_errors=True)
        last = steps(self._directory)
        before = f"the last good one is step {last[-1]}" if last else "there is none before it"
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        return UserError(
            f"can't write the checkpoint of step {step} in {self._directory} ({reason}); {before}: "
            "make room or make it writable, and the same command goes on from there"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # It was told by `wait`.
                self._orbax.close()


def write_params(directory: Path, step: int, params: Any) -> None:
    """Writes a checkpoint of parameters alone: of a model that was not trained here.

    Args:
      directory: of the checkpoints.
      step: what to call it.
      params: the model's parameters.
    """
    path = directory.absolute() / str(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    seal(path)


class Restored(NamedTuple):
    """What training goes on from."""

    step: int
    params: Any
    state: Any
    history: dict[str, int]


def restore_latest(
    directory: Path, params: Any, state: Any, iterator: grain.DatasetIterator
) -> Restored | None:
    """Reads the latest checkpoint that is undamaged; None if there is none at all.

    Damaged ones after it are set aside: renamed and told on standard error.

    Args:
      directory: of the checkpoints.
      params: arrays, or their shapes and dtypes, of the structure to be read.
      state: likewise.
      iterator: of the training batches; it is moved to where the checkpoint was.

    Raises:
      UserError: if all are damaged, or it holds other arrays than `params` and `state`.
    """
    damaged: dict[int, str] = {}
    for step in reversed(steps(directory)):
        reason = damage(directory / str(step))
        if reason is None:
            break
        damaged[step] = reason
    else:
        if damaged:
            raise UserError(
                f"no checkpoint in {directory} is whole ({_list(damaged)}): bring one back from a "
                "copy, or begin anew with another --workdir"
            )
        return None
    args = ocp.args.Composite(
        params=ocp.args.StandardRestore(_abstract(params)),
        state=ocp.args.StandardRestore(_abstract(state)),
        batches=ocp.args.JsonRestore(),
        history=ocp.args.JsonRestore(),
    )
    restored = _restore(directory / str(step), args)
    try:
        iterator.set_state(restored.batches)
    except Exception as error:  # Grain lets through what its parts raise.
        raise UserError(
            f"the checkpoint {directory / str(step)} has no position in the text: {one_line(error)}"
        ) from None
    history = restored.history
    if not isinstance(history, dict) or not all(isinstance(n, int) for n in history.values()):
        raise UserError(f"the checkpoint {directory / str(step)} has no sizes in its history")
    for broken, reason in damaged.items() if hosts.is_first() else ():
        aside = _set_aside(directory / str(broken))
        _warn(f"{directory / str(broken)} is damaged ({reason}): it is now {aside.name}")
    return Restored(step, restored.params, restored.state, history)


def restore_best_params(directory: Path, params: Any) -> tuple[Any, int]:
    """The parameters of the best undamaged checkpoint by validation loss, and its step.

    Where none has a validation loss, it is the latest. Nothing is written, and the run may go on
    saving meanwhile. Damaged checkpoints are told on standard error.

    Args:
      directory: of the checkpoints.
      params: arrays, or their shapes and dtypes, of the structure to be read.

    Raises:
      UserError: if there is none, all are damaged, or it holds other arrays than `params`.
    """
    damaged: dict[int, str] = {}
    args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(params)))
    while (step := best_step(directory, leave_out=damaged)) is not None:
        path = directory / str(step)
        reason = damage(path)
        # A checkpoint that is gone by now was replaced by newer ones: look again.
        if reason is None:
            try:
                return _restore(path, args).params, step
            except UserError:
                if path.exists():
                    raise
        elif path.exists():
            damaged[step] = reason
            _warn(f"{path} is damaged ({reason}): another checkpoint is read")
    if damaged:
        raise UserError(
            f"no checkpoint in {directory} is whole ({_list(damaged)}): bring one back from a copy"
        )
    raise UserError(f"there is no checkpoint in {directory} yet: train first")


def steps(directory: Path) -> list[int]:
    """The steps of all checkpoints, in order."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def best_step(directory: Path, leave_out: Mapping[int, str] | None = None) -> int | None:
    """The step with the best validation loss, else the latest, else None."""
    found = [step for step in steps(directory) if step not in (leave_out or {})]
    losses = {step: validation_loss(directory, step) for step in found}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(measured, key=lambda step: measured[step]) if measured else max(found, default=None)


def validation_loss(directory: Path, step: int) -> float | None:
    """The validation loss of a checkpoint, None if it has none that is a number."""
    try:
        loss = files.read_json(directory / str(step) / VALIDATION)["loss"]
    except (OSError, ValueError, KeyError):
        return None
    return loss if isinstance(loss, float) and np.isfinite(loss) else None


def seal(checkpoint: Path) -> None:
    """Writes the checksum of every file in a checkpoint, all safely on the disk."""
    lines = [f"{_digest(checkpoint / name, sync=True)}  {name}\n" for name in _files(checkpoint)]
    files.write(checkpoint / SEAL, "".join(lines).encode())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file is as it was when it was sealed."""
    try:
        lines = (checkpoint / SEAL).read_text(encoding="utf-8").splitlines()
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        present = _files(checkpoint)
        for name in [*wanted, *present]:
            if name not in present:
                return f"{name} is missing"
            if name not in wanted:
                return f"{SEAL} does not hold {name}"
            if _digest(checkpoint / name) != wanted[name]:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return one_line(error)
    return None if wanted else f"{SEAL} is empty"


def _files(checkpoint: Path) -> list[str]:
    """What a seal covers, sorted; hidden files, which file managers leave, are none of it."""
    paths = [path for path in checkpoint.rglob("*") if not path.is_dir()]
    names = (path.relative_to(checkpoint).as_posix() for path in paths if path.name[0] != ".")
    return sorted(name for name in names if name not in (SEAL, VALIDATION))


def _digest(path: Path, sync: bool = False) -> str:
    if not path.is_file():  # Reading a pipe would never end.
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _restore(path: Path, args: ocp.args.Composite) -> Any:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.absolute(), args=args)
    except Exception as error:  # Orbax hands on what the layers below it raise.
        reason = one_line(error)[:300]
        raise UserError(
            f"the checkpoint {path} does not hold the model that the config describes: {reason}"
        ) from None


def _set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to a name that says so, and is free."""
    aside = path.with_name(path.name + _DAMAGED)
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}{_DAMAGED}-{number}")
        number += 1
    return path.rename(aside)


def _abstract(tree: Any) -> Any:
    """Shapes and dtypes, to be placed where the arrays are, wherever they were saved.

    What has no place yet goes to this process's first device.
    """
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(array: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(array, "sharding", None) or first
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree)


def _list(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
