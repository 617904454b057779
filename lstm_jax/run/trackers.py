"""Pass the rows of a run to Weights & Biases or a function: the flag --track."""

import contextlib
import html
import importlib.util
import os
import pkgutil
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lstm_jax.data import files
from lstm_jax.errors import UserError, one_line, warn
from lstm_jax.run import metrics, workdir
from lstm_jax.run.metrics import Row

# The file of a tracked run that holds its identity, with a limit of its size in bytes.
TRACKED, _LIMIT = "tracked.json", 2**10


# Two functions: one adds a row of metrics.jsonl, with the `sample` of a validation; the other sends
# the remaining rows and closes the tracker, and is given whether training failed.
_Tracker = tuple[Callable[[Row], object], Callable[[bool], object]]


def _open_wandb(directory: Path) -> _Tracker:
    """Open Weights & Biases, in the project that WANDB_PROJECT names, or else lstm-jax."""
    import wandb

    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lstm-jax"),
        id=_get_identity(directory),
        name=directory.resolve().name,
        dir=os.environ.get("WANDB_DIR", str(directory)),
        resume="allow",
        settings=wandb.Settings(console="off"),
    )
    hyperparameters = metrics.list_hyperparameters(workdir.load_config(directory))
    opened.config.update(hyperparameters, allow_val_change=True)
    # The row of the test split has an earlier step, which W&B's own steps can't be.
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")

    def write(row: Row) -> None:
        entry: dict[str, object] = {"step": row["step"], "epoch": row["epoch"]}
        for name, value in row.items():  # Others are named by their split, as in TensorBoard.
            if isinstance(value, float | int) and name not in entry:
                entry[f"{row['split']}/{name}"] = value
        if "sample" in row:
            text = f"<pre style='white-space: pre-wrap'>{html.escape(row['sample'])}</pre>"
            entry["validation/sample"] = wandb.Html(text)
        opened.log(entry)

    return write, lambda failed: opened.finish(exit_code=int(failed))


_TRACKERS: dict[str, Callable[[Path], _Tracker]] = {"wandb": _open_wandb}


@contextlib.contextmanager
def open_trackers(names: Sequence[str], directory: Path) -> Iterator[Callable[[Row], None]]:
    """Yield a callback for `train` that sends the rows of the run in `directory` to trackers.

    Trackers are opened at the first row, after all checks of the run. One that fails later gets no
    more rows, with a warning, and training continues.

    Args:
      names: the names of trackers, or of functions as package.module:function.
      directory: the working directory.

    Raises:
      UserError: if there is no such tracker, its package is missing, or it can't be opened.
    """
    makers = {name: _find_tracker(name) for name in names}
    opened: dict[str, _Tracker] = {}

    def watch(row: Row) -> None:
        for name in list(makers):
            try:
                opened[name] = makers.pop(name)(directory)
            except Exception as error:  # Each has its own.
                raise UserError(
                    f"--track={name} failed ({one_line(error)[:300]}): correct that, or leave it "
                    "out; the same command resumes"
                ) from None
        for name, (write, _) in list(opened.items()):
            try:
                write({**row})  # It may change its own.
            except Exception as error:
                warn(f"--track={name} failed and gets no more rows ({one_line(error)[:300]})")
                close(name, failed=True)

    def close(name: str, failed: bool) -> None:
        try:
            opened.pop(name)[1](failed)
        except Exception as error:
            warn(f"--track={name} failed to close ({one_line(error)[:300]})")

    failed = True
    try:
        yield watch
        failed = False
    finally:
        for name in list(opened):
            close(name, failed)


def _find_tracker(name: str) -> Callable[[Path], _Tracker]:
    if name in _TRACKERS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # A directory here may have its name.
            raise UserError(
                f"--track={name} needs the package {name}: pip install 'lstm-jax[track-{name}]'"
            )
        return _TRACKERS[name]
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UserError(
            f"--track is {name!r}: it must be {', '.join(_TRACKERS)}, or the name of a function as "
            "package.module:function"
        )
    if os.getcwd() not in sys.path:  # It is not, in the script `lstm-jax`.
        sys.path.append(os.getcwd())
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # The module is a user's code.
        raise UserError(f"--track={name} can't be imported: {one_line(error)}") from None
    if not callable(function):
        raise UserError(f"--track={name} is not a function")
    return lambda directory: (function, lambda failed: None)


def _get_identity(directory: Path) -> str:
    """Return the identity of a run, which is drawn when it is first tracked."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        identity = files.read_json(directory / TRACKED, _LIMIT)["identity"]
        if isinstance(identity, str) and re.fullmatch("[0-9a-f]{8}", identity):
            return identity
    identity = secrets.token_hex(4)
    files.write_json(directory / TRACKED, {"identity": identity})
    return identity
