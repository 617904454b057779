"""Pass the rows of a run to Weights & Biases, MLflow, Trackio or a function: the flag --track."""

import contextlib
import html
import importlib.util
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from lstm_jax import config as config_lib
from lstm_jax.data import files
from lstm_jax.errors import UserError, one_line, warn
from lstm_jax.run import metrics, workdir
from lstm_jax.run.metrics import Row

# The file of a tracked run that holds its identity, with a limit of its size in bytes.
TRACKED, _LIMIT = "tracked.json", 2**10
# The default name of a project or experiment that holds the runs.
_PROJECT = "lstm-jax"


class _TrackedRun(NamedTuple):
    """The name, the identity and the config of a run, with which a tracker is opened."""

    directory: Path
    name: str  # The name that people see.
    identity: str  # The same whenever the run resumes.
    config: dict[str, bool | int | float | str]


class _Tracker(Protocol):
    """A destination for the rows of one run; it is made from a `_TrackedRun`, new or resumed."""

    def write(self, row: Row, /) -> object:
        """Add a row of metrics.jsonl; those of validations also have a `sample`."""

    def close(self, failed: bool) -> None:
        """Send the remaining rows, and close the tracker."""


def _list_numbers(row: Row) -> dict[str, float]:
    """Return the numbers of a row but its step, named by their split as in TensorBoard."""
    numbers = {name: value for name, value in row.items() if isinstance(value, float | int)}
    epoch, _ = numbers.pop("epoch"), numbers.pop("step")
    return {"epoch": epoch, **{f"{row['split']}/{name}": numbers[name] for name in numbers}}


class _Wandb:
    """Weights & Biases, in the project that WANDB_PROJECT names, or else lstm-jax."""

    def __init__(self, run: _TrackedRun) -> None:
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.identity,
            name=run.name,
            dir=os.environ.get("WANDB_DIR", str(run.directory)),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self._run.config.update(run.config, allow_val_change=True)
        # The row of the test split is that of an earlier step, which W&B's own steps can't be.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        entry: dict[str, object] = {"step": row["step"], **_list_numbers(row)}
        if "sample" in row:
            text = f"<pre style='white-space: pre-wrap'>{html.escape(row['sample'])}</pre>"
            entry["validation/sample"] = self._html(text)
        self._run.log(entry)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """MLflow, in the experiment that MLFLOW_EXPERIMENT_NAME names, or else lstm-jax."""

    _TAG = "lstm_jax.run"

    def __init__(self, run: _TrackedRun) -> None:
        from mlflow import MlflowClient, entities

        self._client, self._entities = MlflowClient(), entities
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.`{self._TAG}` = '{run.identity}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {self._TAG: run.identity}
            made = self._client.create_run(number, tags=tags, run_name=run.name)
            self._run = made.info.run_id
            # A run can't change them when it resumes.
            params = [entities.Param(key, str(value)) for key, value in run.config.items()]
            self._client.log_batch(self._run, params=params)

    def write(self, row: Row) -> None:
        now, step = int(1000 * time.time()), row["step"]
        numbers = [
            self._entities.Metric(name, value, now, step)
            for name, value in _list_numbers(row).items()
        ]
        self._client.log_batch(self._run, metrics=numbers)
        if "sample" in row:
            self._client.log_text(self._run, row["sample"], f"samples/step_{step:09}.txt")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class _Trackio:
    """Trackio, in the project lstm-jax."""

    def __init__(self, run: _TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        # It identifies a run by its name.
        name = f"{run.name}-{run.identity}"
        self._run = trackio.init(_PROJECT, name, config=run.config, resume="allow", embed=False)

    def write(self, row: Row) -> None:
        entry: dict[str, object] = {**_list_numbers(row)}
        if "sample" in row:
            entry["validation/sample"] = self._trackio.Markdown(
                metrics.quote_markdown(row["sample"])
            )
        self._run.log(entry, step=row["step"])

    def close(self, failed: bool) -> None:
        self._trackio.finish()


class _Function:
    """A function that is called with each row."""

    def __init__(self, function: Callable[[Row], object]) -> None:
        self.write = function

    def close(self, failed: bool) -> None:
        """Do nothing."""


_TRACKERS: dict[str, Callable[[_TrackedRun], _Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


@contextlib.contextmanager
def open_trackers(names: Sequence[str], directory: Path) -> Iterator[Callable[[Row], None]]:
    """Yield a callback for `train` that sends the rows of the run in `directory` to trackers.

    Trackers are opened with the first row, when nothing can be wrong with the run any more. One
    that fails later gets no more rows, with a warning, and training continues.

    Args:
      names: the names of trackers, or of functions as package.module:function.
      directory: the working directory.

    Raises:
      UserError: if there is no such tracker, its package is missing, or it can't be opened.
    """
    makers = {name: _find_tracker(name) for name in names}
    opened: dict[str, _Tracker] = {}

    def watch(row: Row) -> None:
        if makers:
            fields = config_lib.flatten(workdir.load_config(directory))
            config = metrics.list_hyperparameters(fields)
            run = _TrackedRun(directory, directory.resolve().name, _get_identity(directory), config)
            for name in list(makers):
                try:
                    opened[name] = makers.pop(name)(run)
                except Exception as error:  # Each has its own.
                    raise UserError(
                        f"--track={name} failed ({one_line(error)[:300]}): correct that, or leave "
                        "it out; the same command resumes"
                    ) from None
        for name, tracker in list(opened.items()):
            try:
                tracker.write(row)
            except Exception as error:
                del opened[name]
                warn(f"--track={name} failed and gets no more rows ({one_line(error)[:300]})")

    failed = True
    try:
        yield watch
        failed = False
    finally:
        for name, tracker in opened.items():
            try:
                tracker.close(failed)
            except Exception as error:
                warn(f"--track={name} failed to close ({one_line(error)[:300]})")


def _find_tracker(name: str) -> Callable[[_TrackedRun], _Tracker]:
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
    path, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # It is not, in the script `lstm-jax`.
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(path), function_name)
    except Exception as error:  # The module is a user's code.
        raise UserError(f"--track={name} can't be imported: {one_line(error)}") from None
    if not callable(function):
        raise UserError(f"--track={name} is not a function")
    return lambda run: _Function(function)


def _get_identity(directory: Path) -> str:
    """Return the identity of a run, which is drawn when it is first tracked."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        identity = files.read_json(directory / TRACKED, _LIMIT)["identity"]
        if isinstance(identity, str) and re.fullmatch("[0-9a-f]{8}", identity):
            return identity
    identity = secrets.token_hex(4)
    files.write_json(directory / TRACKED, {"identity": identity})
    return identity
