"""Send the rows of a run to Weights & Biases: the flag --track wandb."""

import contextlib
import functools
import html
import importlib.util
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lstm_jax.data import files
from lstm_jax.errors import UserError, one_line
from lstm_jax.run import metrics, workdir

TRACKED = "tracked.json"  # The file of a tracked run that holds its identity.


@contextlib.contextmanager
def open_wandb(directory: Path) -> Iterator[metrics.Watch]:
    """Yield a callback for `train` that sends the rows of the run in `directory` to W&B.

    It is opened at the first row, after all checks of the run.

    Raises:
      UserError: if the package is missing, or it can't be opened.
    """
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # A directory here may have its name.
        raise UserError("--track wandb needs its package: pip install 'lstm-jax[track-wandb]'")
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start() -> Any:
            try:
                return stack.enter_context(_start(directory))
            except Exception as error:  # Such as a missing key.
                raise UserError(
                    f"--track wandb failed ({one_line(error)[:300]}): correct that, or leave it "
                    "out; the same command resumes"
                ) from None

        yield lambda row: _send(start(), row)


def _start(directory: Path) -> Any:
    """Return a `wandb.Run`, in the project that WANDB_PROJECT names, or else lstm-jax."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lstm-jax"),
        id=_get_identity(directory),
        name=directory.resolve().name,
        dir=os.environ.get("WANDB_DIR", str(directory)),
        resume="allow",
        settings=wandb.Settings(console="off"),
    )
    hyperparameters = metrics.list_hyperparameters(workdir.load_config(directory))
    run.config.update(hyperparameters, allow_val_change=True)
    # The row of the test split has an earlier step, which W&B's own steps can't be.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _send(run: Any, row: metrics.Row) -> None:
    import wandb

    entry: dict[str, object] = {"step": row["step"], "epoch": row["epoch"]}
    for name, value in row.items():  # Others are named by their split, as in TensorBoard.
        if isinstance(value, float | int) and name not in entry:
            entry[f"{row['split']}/{name}"] = value
    if "sample" in row:
        text = f"<pre style='white-space: pre-wrap'>{html.escape(row['sample'])}</pre>"
        entry["validation/sample"] = wandb.Html(text)
    run.log(entry)


def _get_identity(directory: Path) -> str:
    """Return the identity of a run, which is drawn when it is first tracked."""
    path = directory / TRACKED
    if not path.exists():
        files.write_json(path, {"identity": secrets.token_hex(4)})
    identity: str = files.read_json(path)["identity"]
    return identity
