"""Checkpoints: written beside the training, whole or not there at all, sealed with checksums.

A checkpoint is a directory named by its step. Orbax writes its arrays and the position in the
text; SHA256SUMS holds the checksum of each file (`sha256sum -c SHA256SUMS` checks them too).

A checkpoint may have been made by someone else. Before its arrays are read, its files are held to
the model that the config describes: regular files, no links, and as large as such arrays make them.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from lstm_jax import model as model_lib
from lstm_jax.devices import hosts
from lstm_jax.errors import UnavailableError, UserError, one_line
from lstm_jax.run import files

SEAL = "SHA256SUMS"
# Measured after the checkpoint is sealed, so its checksum does not cover it.
VALIDATION = "validation.json"
_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"

# Sizes of files in bytes, at the most: SHA256SUMS, validation.json, and what is no array.
_SEAL_LIMIT, _VALIDATION_LIMIT, _METADATA_LIMIT = 2**24, 2**12, 2**24
# A checkpoint takes at most so many times the bytes of its parameters (Adam's state is twice their
# size, a moving average once), besides a carry of any batch that fits into this.
_MOST_TIMES, _MOST_BESIDE = 8, 2**30
# Orbax compresses arrays. Those that were trained shrink by a tenth, and by half if they were
# rounded to bfloat16; zeros would shrink to nothing, and take any amount of memory when read.
_LEAST_SHARE, _SMALL = 1 / 8, 2**26


class CheckpointWriter:
    """Saves the checkpoints of a run; kept are the latest two and the best by validation loss.

    It is to be used by the processes of one run only, of which one holds the lock of the working
    directory; all call the same methods in the same order.
    """

    def __init__(self, directory: Path) -> None:
        """Makes the directory and clears away what a killed process left half-done in it.

        Raises:
          UserError: if something else is where checkpoints are to be.
        """
        _check_is_no_link(directory)
        self._directory = directory.resolve()
        with hosts.first_goes_ahead("checkpoints"):
            if hosts.is_first():
                self._directory.mkdir(exist_ok=True)
                self._clear()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future[None]] | None = None

    def _clear(self) -> None:
        """Removes unfinished checkpoints, and refuses what would be in the way of new ones."""
        known = {str(step) for step in list_steps(self._directory)}
        for path in sorted(self._directory.iterdir()):
            unfinished = _UNFINISHED in path.name
            if unfinished and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif unfinished or (path.name.isdecimal() and path.name not in known):
                raise UserError(f"{path} is no checkpoint: move it away")

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
          UnavailableError: if it, or the one before, can't be written.
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
        seal_checkpoint(path)
        path.rename(self._directory / str(step))
        files.sync_directory(self._directory)
        kept = {*list_steps(self._directory)[-2:], find_best_step(self._directory)}
        for old in set(list_steps(self._directory)) - kept:
            # A reader finds a checkpoint whole or not at all, also while it goes.
            doomed = self._directory / f"{old}{_UNFINISHED}"
            (self._directory / str(old)).rename(doomed)
            shutil.rmtree(doomed)

    def record_validation(self, step: int, loss: float) -> None:
        """Adds the validation loss, in nats per token, to the checkpoint of `step`."""
        self.wait()
        files.write_json(self._directory / str(step) / VALIDATION, {"loss": loss})

    def check(self) -> bool:
        """Whether one is still being written; raises `UnavailableError` if one could not be."""
        if self._saving and self._saving[1].done():
            self.wait()
        return self._saving is not None

    def wait(self) -> None:
        """Waits until all is written; raises `UnavailableError` if it can't be."""
        if self._saving:
            step, future = self._saving
            try:
                future.result()
            except Exception as error:
                self._saving = None
                raise self._failed(step, error) from None
            self._saving = None

    def _failed(self, step: int, error: Exception) -> UnavailableError:
        """What to tell of a checkpoint that can't be written, whose remains are cleared away."""
        for remains in self._directory.glob(f"{step}{_UNFINISHED}*"):
            shutil.rmtree(remains, ignore_errors=True)
        last = list_steps(self._directory)
        before = f"the last good one is step {last[-1]}" if last else "there is none before it"
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        return UnavailableError(
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


def save_params(directory: Path, step: int, params: Any) -> None:
    """Writes a checkpoint of parameters alone: of a model that was not trained here.

    Args:
      directory: of the checkpoints.
      step: what to call it.
      params: the model's parameters.
    """
    path = directory.absolute() / str(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    seal_checkpoint(path)


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
    _check_is_no_link(directory)
    args = ocp.args.Composite(
        params=ocp.args.StandardRestore(_abstract(params)),
        state=ocp.args.StandardRestore(_abstract(state)),
        batches=ocp.args.JsonRestore(),
        history=ocp.args.JsonRestore(),
    )
    damaged: dict[int, str] = {}
    for step in reversed(list_steps(directory)):
        path = directory / str(step)
        reason = find_damage(path, params)
        if reason is None:
            restored = _restore(path, args)
            reason = _disagreement(restored, step)
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
    try:
        iterator.set_state(restored.batches)
    except Exception as error:  # Grain lets through what its parts raise.
        raise UserError(
            f"the checkpoint {path} has no position in the text: {one_line(error)}"
        ) from None
    for broken, reason in damaged.items() if hosts.is_first() else ():
        aside = _set_aside(directory / str(broken))
        _warn(f"{directory / str(broken)} is damaged ({reason}): it is now {aside.name}")
    return Restored(step, restored.params, restored.state, restored.history)


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
    _check_is_no_link(directory)
    damaged: dict[int, str] = {}
    args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(params)))
    while (step := find_best_step(directory, leave_out=damaged)) is not None:
        path = directory / str(step)
        reason = find_damage(path, params)
        # A checkpoint that is gone by now was replaced by newer ones: look again.
        if reason is None:
            try:
                restored = _restore(path, args).params
            except UserError:
                if path.exists():
                    raise
                continue
            if _is_finite(restored):
                return restored, step
            reason = _NOT_FINITE
        if path.exists():
            damaged[step] = reason
            _warn(f"{path} is damaged ({reason}): another checkpoint is read")
    if damaged:
        raise UserError(
            f"no checkpoint in {directory} is whole ({_list(damaged)}): bring one back from a copy"
        )
    raise UserError(f"there is no checkpoint in {directory} yet: train first")


def list_steps(directory: Path) -> list[int]:
    """The steps of all checkpoints, in order; links and numbers beyond int32 are none."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    numbers = [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name)]
    return sorted(number for number in numbers if number < 2**31)


def find_best_step(directory: Path, leave_out: Mapping[int, str] | None = None) -> int | None:
    """The step with the best validation loss, else the latest, else None."""
    found = [step for step in list_steps(directory) if step not in (leave_out or {})]
    losses = {step: read_validation_loss(directory, step) for step in found}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(measured, key=lambda step: measured[step]) if measured else max(found, default=None)


def read_validation_loss(directory: Path, step: int) -> float | None:
    """The validation loss of a checkpoint, None if it has none that is a number."""
    try:
        path = directory / str(step) / VALIDATION
        loss = files.read_json(path, _VALIDATION_LIMIT)["loss"]
    except (OSError, ValueError, KeyError):
        return None
    return loss if isinstance(loss, float) and np.isfinite(loss) else None


def is_validated(directory: Path, step: int) -> bool:
    """Return whether the checkpoint of `step` has a validation loss."""
    return (directory / str(step) / VALIDATION).exists()


def seal_checkpoint(checkpoint: Path) -> None:
    """Writes the checksum of every file in a checkpoint, all safely on the disk."""
    lines = [f"{_digest(checkpoint / name, sync=True)}  {name}\n" for name in _files(checkpoint)]
    files.write_file(checkpoint / SEAL, "".join(lines).encode())


def find_damage(checkpoint: Path, params: Any = None) -> str | None:
    """What is wrong with a checkpoint, None if every file is as it was when it was sealed.

    Args:
      checkpoint: its directory.
      params: what is to be read of it, arrays or their shapes and dtypes: its files are held to
        their sizes before they are read. None: to none.
    """
    try:
        text = files.read_bytes(checkpoint / SEAL, _SEAL_LIMIT).decode()
        wanted = {
            name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())
        }
        present = _files(checkpoint)
        for name in [*wanted, *present]:
            if name not in present:
                return f"{name} is missing"
            if name not in wanted:
                return f"{SEAL} does not hold {name}"
        if params is not None and (reason := _misfit(checkpoint, present, params)):
            return reason
        for name in present:
            if _digest(checkpoint / name) != wanted[name]:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        name = Path(error.filename or "").name
        return f"{name}: {error.strerror}" if name else one_line(error)
    except ValueError as error:
        return one_line(error)
    return None if wanted else f"{SEAL} is empty"


def _misfit(checkpoint: Path, names: Sequence[str], params: Any) -> str | None:
    """Why files of these sizes can't hold such parameters, None if they can."""
    sizes = {name: (checkpoint / name).stat().st_size for name in names}
    for name, size in sizes.items():
        is_data = "/d/" in name or name.endswith(".ocdbt")
        if not is_data and size > _METADATA_LIMIT:
            return f"{name} is too large, with {size:,} bytes"
    needed = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params))
    held = sum(size for name, size in sizes.items() if name.startswith("params/"))
    if needed > _SMALL and held < _LEAST_SHARE * needed:
        return f"its {held:,} bytes can't hold the {needed:,} bytes of parameters that are wanted"
    if (total := sum(sizes.values())) > _MOST_TIMES * needed + _MOST_BESIDE:
        return f"its files are too large for such a model, with {total:,} bytes"
    return None


def _files(checkpoint: Path) -> list[str]:
    """What a seal covers, sorted; hidden files, which file managers leave, are none of it.

    Raises:
      ValueError: if there is anything but regular files and directories.
    """
    found: list[str] = []
    directories = [""]
    while directories:
        within = directories.pop()
        with os.scandir(checkpoint / within) as entries:
            for entry in entries:
                name = within + entry.name
                if entry.is_dir(follow_symlinks=False):
                    directories.append(f"{name}/")
                elif not entry.name.startswith("."):
                    if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                        raise ValueError(f"{name} is no regular file")
                    found.append(name)
    return sorted(name for name in found if name not in (SEAL, VALIDATION))


def _digest(path: Path, sync: bool = False) -> str:
    with files.open_regular(path) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


_NOT_FINITE = "its parameters are not finite"


# Of many processes, each of which has a part, all get the answer.
_is_finite = jax.jit(model_lib.is_finite)


def _disagreement(restored: Any, step: int) -> str | None:
    """What is wrong with the content of a checkpoint whose files are whole; None if nothing is."""
    own = restored.state.get("step", step) if isinstance(restored.state, dict) else step
    if int(own) != step:
        return f"it is the checkpoint of step {int(own)}"
    if not _is_finite(restored.params):
        return _NOT_FINITE
    history = restored.history
    if not isinstance(history, dict) or not all(
        isinstance(size, int) and size >= 0 for size in history.values()
    ):
        return "it has no sizes in its history"
    return None


def _check_is_no_link(directory: Path) -> None:
    """Raises `UserError` if checkpoints are somewhere else, where they may be another run's."""
    if directory.is_symlink():
        raise UserError(
            f"{directory} is a link: the checkpoints of a run are in its own working directory; "
            "move that as a whole"
        )


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
    while os.path.lexists(aside):
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
