"""Save and restore checkpoints: atomic, sealed with checksums.

A checkpoint is a directory named by its step. Orbax writes its arrays; SHA256SUMS holds the
checksum of each file (`sha256sum -c SHA256SUMS` verifies them too).
"""

import functools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices

from lstm_jax.data import files
from lstm_jax.devices import mesh, processes
from lstm_jax.errors import UnavailableError, UserError, one_line, warn
from lstm_jax.model import Params
from lstm_jax.run.workdir import list_steps, measure_history

_UNFINISHED = ".unfinished"
SEAL = "SHA256SUMS"
# Written after the checkpoint is sealed, so the seal does not cover it.
VALIDATION = "validation.json"
# If Orbax made directories in the background, threads of runs in one process that save at the same
# time would wait for those of each other.
_OPTIONS = ocp.CompositeOptions(
    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)
)


class CheckpointWriter:
    """Saves the checkpoints of a run; keeps the latest two and the best by validation loss.

    Only the processes of one run may use it, one of which holds the lock of the working directory.
    """

    # Orbax's CheckpointManager would break three guarantees: SHA256SUMS is written before a
    # checkpoint gets its name, the validation loss is added after the save, and a checkpoint is
    # renamed before its files are removed, so that a reader never sees half of it.

    def __init__(self, directory: Path, every_seconds: float = 0.0) -> None:
        """Make `directory`, in a working directory, and remove unfinished checkpoints from it."""
        self._workdir, self._every_seconds = directory.parent, every_seconds
        self._directory = directory.resolve()
        if processes.is_first():
            self._directory.mkdir(exist_ok=True)
            for path in self._directory.glob(f"*{_UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)  # A reader may have a file of it open.
        sync_global_devices("checkpoints")
        self.last_step = max(list_steps(self._directory), default=-1)  # Also of earlier processes.
        self._last_time = time.monotonic()  # Of the start, or of the last save.

    def save(self, step: int, params: Params, state: Mapping[str, object]) -> None:
        """Save a checkpoint after `step` training steps.

        `state` is all of the training state but `params`. The checkpoint also has the sizes of the
        files that the run appends to. Raise `UnavailableError` if it can't be written, or the one
        before is gone.
        """
        history = measure_history(self._workdir)
        if jax.process_count() == 1:  # Save arrays that every device has from one, not in parts.
            params, state = mesh.get_local_copy((params, state))
        path = self._directory / f"{step}{_UNFINISHED}"
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(state),
            history=ocp.args.JsonSave(history),
        )
        try:
            if processes.is_first() and self.last_step >= 0:
                (self._directory / str(self.last_step)).stat()  # Orbax would make the directory.
            handler = ocp.CompositeCheckpointHandler(composite_options=_OPTIONS)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(path, args=items)
            if processes.is_first():
                self._finish(path, step)
        except jax.errors.JaxRuntimeError:  # Another process has ended.
            raise
        except FileNotFoundError:
            raise UnavailableError(
                f"a checkpoint in {self._directory} is gone: the working directory was moved or "
                "removed during training; resume with its present path in --workdir"
            ) from None
        except Exception as error:  # Orbax re-raises any exception of its storage.
            raise UnavailableError(
                f"can't write a checkpoint in {self._directory} ({one_line(error)}): free space or "
                "make it writable, then resume with the same command"
            ) from None
        self.last_step, self._last_time = step, time.monotonic()

    def _finish(self, path: Path, step: int) -> None:
        seal_checkpoint(path)
        path.rename(self._directory / str(step))
        files.sync_directory(self._directory)
        steps = list_steps(self._directory)
        best = max(steps, key=functools.partial(_rank, self._directory))
        for old in set(steps) - {*steps[-2:], best}:
            unfinished = self._directory / f"{old}{_UNFINISHED}"
            (self._directory / str(old)).rename(unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)  # If it fails, the next writer tries.

    def record_validation(self, step: int, loss: float) -> None:
        """Add its validation loss, in nats per token, to a checkpoint, and the sizes of files."""
        fields = {"loss": loss, "history": measure_history(self._workdir)}
        files.write_json(self._directory / str(step) / VALIDATION, fields)

    def is_due(self) -> bool:
        """Return whether the last save is `every_seconds` old, in any process."""
        is_old = time.monotonic() - self._last_time >= self._every_seconds
        return bool(processes.max_over_processes(is_old))


def seal_checkpoint(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to disk, and write its checksum to SHA256SUMS."""
    lines = [
        f"{files.hash_file(path, sync=True)}  {path.relative_to(checkpoint).as_posix()}\n"
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    ]
    files.write_file(checkpoint / SEAL, "".join(lines).encode())


def find_damage(checkpoint: Path) -> str | None:
    """Return how a checkpoint's files differ from those that were sealed; None if they don't.

    Other files are ignored: file managers add some.
    """
    try:
        lines = files.check_file(checkpoint / SEAL).read_text().splitlines()
        for digest, _, name in (line.partition("  ") for line in lines):
            if files.hash_file(checkpoint / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError) as error:
        return one_line(error)
    return None if lines else f"{SEAL} is empty"


def restore_latest(
    directory: Path, params: Params, state: Mapping[str, object]
) -> tuple[int, Any, bool, dict[str, int]]:
    """Restore the latest undamaged checkpoint; rename later ones, each with a warning.

    Return its step; its `params` and `state`; whether it has a validation loss; and the sizes of
    the files that the run appends to. `params` and `state` have the expected shapes and dtypes, as
    arrays or `jax.ShapeDtypeStruct`s. Raise `UserError` if there is no checkpoint, all are damaged,
    or one does not hold such arrays.
    """
    step, items, damaged = _restore_first(
        directory,
        lambda step: (step, 0),  # The latest one has the highest rank.
        params=ocp.args.StandardRestore(_abstract(params)),
        state=ocp.args.StandardRestore(_abstract(state)),
        history=ocp.args.JsonRestore(),
    )
    for path, damage in damaged.items() if processes.is_first() else ():
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)  # That of an earlier time.
        path.rename(aside)
        warn(f"{path} is damaged ({damage}): it is now {aside.name}")
    validation = _read_validation(directory, step)
    return step, items, bool(validation), validation.get("history", items.history)


def restore_best_params(directory: Path, params: Params) -> tuple[Params, int]:
    """Return the parameters of the best undamaged checkpoint by validation loss, and its step.

    If none has a validation loss, it is the latest. Nothing is written, and the run may save
    checkpoints at the same time. Each damaged one is reported with a warning. For `params` and
    errors, see `restore_latest`.
    """
    rank = functools.partial(_rank, directory)
    arguments = ocp.args.StandardRestore(_abstract(params))
    step, items, damaged = _restore_first(directory, rank, params=arguments)
    for path, damage in damaged.items():
        warn(f"{path} is damaged ({damage}): another checkpoint is read")
    return items.params, step


def _rank(directory: Path, step: int) -> tuple[float, int]:
    """Rank by validation loss; without one, by step."""
    loss = _read_validation(directory, step).get("loss")
    return (-np.inf, step) if loss is None else (-loss, 0)


def _read_validation(directory: Path, step: int) -> dict[str, Any]:
    """Return the validation `loss` of a checkpoint, and the `history` after it, if it has these.

    Return {} if the loss is not finite or there is no valid file.
    """
    path = directory / str(step) / VALIDATION
    try:
        fields = files.read_json(path)
        return fields if np.isfinite(fields["loss"]) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        warn(f"{path} is damaged ({one_line(error)}): the loss of this checkpoint is unknown")
        return {}


def _restore_first(
    directory: Path, rank: Callable[[int], tuple[float, int]], **items: object
) -> tuple[int, Any, dict[Path, str]]:
    """Return step and items of the highest-ranked undamaged checkpoint.

    The last result describes the damage of those ranked higher.
    """
    damaged: dict[Path, str] = {}
    while steps := [s for s in list_steps(directory) if directory / str(s) not in damaged]:
        step = max(steps, key=rank)
        path = directory / str(step)
        damage = find_damage(path)
        try:
            if damage is None:
                with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                    arguments = ocp.args.Composite(**items)
                    return step, checkpointer.restore(path.resolve(), args=arguments), damaged
        except jax.errors.JaxRuntimeError:  # Too little memory, or a lost process.
            raise
        except Exception as error:  # Orbax re-raises any exception of its storage.
            if path.exists():
                raise UserError(
                    f"the checkpoint {path} does not hold the arrays of this model and optimizer "
                    f"({one_line(error)[:300]}): use the code that saved it, or start a new run "
                    f"with its parameters (--init_from {directory.parent})"
                ) from None
        if damage and path.exists():  # Otherwise the run has just replaced it by a newer one.
            damaged[path] = damage
    if not damaged:
        raise UserError(f"there is no checkpoint in {directory} yet: train first")
    reasons = "; ".join(f"step {path.name}: {damage}" for path, damage in damaged.items())
    raise UserError(f"every checkpoint in {directory} is damaged ({reasons}): restore a copy")


def _abstract(tree: Any) -> Any:
    """Return shapes, dtypes and shardings; the default is this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or first), tree
    )
