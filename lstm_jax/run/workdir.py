"""The working directory of a run: its config, its vocabulary and its checkpoints."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, files
from lstm_jax.vocabulary import Vocabulary

CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples.txt"
CURVES = "curves.png"
CHANGES = "changes.jsonl"
# Files that a run appends to, those of TensorBoard among them. A checkpoint holds their sizes, so
# that a run that goes on from it first drops what was written after it.
HISTORY = (METRICS, SAMPLES, "events.out.tfevents.*")
# Sizes in bytes that config and vocabulary have at the most.
_CONFIG_LIMIT, _VOCABULARY_LIMIT = 2**20, 2**25


def load_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      UserError: if there is no run, or its config is damaged.
    """
    if not (workdir / CONFIG).exists():
        raise UserError(
            f"there is no trained model in {workdir} (no {CONFIG}): name the --workdir of a "
            f"training run, or train one with python -m lstm_jax.main --config "
            f"experiments/quick.py --workdir {workdir}"
        )
    try:
        fields = files.read_json(workdir / CONFIG, _CONFIG_LIMIT)
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / CONFIG} is damaged: {_reason(error)}") from None
    return config_lib.complete_config(fields)


def load_vocabulary(workdir: Path) -> Vocabulary:
    """The vocabulary of the run in `workdir`.

    Raises:
      UserError: if it is missing or damaged.
    """
    try:
        fields = files.read_json(workdir / VOCABULARY, _VOCABULARY_LIMIT)
        return Vocabulary.from_json(json.dumps(fields))
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / VOCABULARY} is missing or damaged: {_reason(error)}") from None


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def load_params(workdir: Path, model: model_lib.LanguageModel) -> tuple[model_lib.Params, int]:
    """The parameters of the best undamaged checkpoint by validation loss, and its step.

    Raises:
      UserError: if there is none, or it is of another model.
    """
    abstract = jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0)))
    return checkpoints.restore_best_params(workdir / CHECKPOINTS, abstract)


class Trained(NamedTuple):
    """A trained model, read from a working directory."""

    config: ConfigDict
    vocabulary: Vocabulary
    model: model_lib.LanguageModel
    params: model_lib.Params
    step: int


def load_trained(workdir: Path | str) -> Trained:
    """The trained model in `workdir`: the best checkpoint by validation loss, else the latest.

    Raises:
      UserError: if there is none.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    vocabulary = load_vocabulary(workdir)
    config.model.recurrence = "auto"  # The run's own may need another kind of device.
    model = model_lib.make_model(config.model, len(vocabulary))
    params, step = load_params(workdir, model)
    return Trained(config, vocabulary, model, params, step)


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Writes what `load_config` reads."""
    files.write_json(workdir / CONFIG, config.to_dict())


def save_vocabulary(workdir: Path, vocabulary: Vocabulary) -> None:
    """Writes what `load_vocabulary` reads."""
    files.write_json(workdir / VOCABULARY, json.loads(vocabulary.to_json()), indent=0)


def append_changes(workdir: Path, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Notes that fields of the config were changed after `step`: before and after, by field."""
    with files.open_append(workdir / CHANGES) as file:
        file.write((json.dumps({"step": step, "changes": changes}) + "\n").encode())


def history_sizes(workdir: Path) -> dict[str, int]:
    """The sizes in bytes of the files that a run appends to, all safely on the disk."""
    sizes = {}
    for path in _history(workdir):
        with files.open_regular(path) as file:
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def restore_history(workdir: Path, sizes: dict[str, int]) -> None:
    """Drops what was written to the files of `history_sizes` after it returned `sizes`.

    A file that has become shorter since, or is gone, is told on standard error.
    """
    for path in _history(workdir):
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)
    for name, size in sizes.items():
        path = workdir / Path(name).name
        if size > (path.stat().st_size if path.exists() else 0):
            print(f"warning: {path} has lost some of what was in it", file=sys.stderr)


def check_own_files(workdir: Path) -> None:
    """Raises `UserError` if a run can't be trained in a directory for what else is there.

    Through a link others' files would be written; reading a pipe never ends.
    """
    for path in [*workdir.iterdir(), *workdir.glob("plugins/**/")]:
        if path.is_symlink():
            raise UserError(f"{path} is a link: a run is trained in files of its own, copy it")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is not a regular file: move it away")


def _history(workdir: Path) -> list[Path]:
    return [path for pattern in HISTORY for path in sorted(workdir.glob(pattern))]
