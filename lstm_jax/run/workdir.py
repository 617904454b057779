"""Read and write the working directory of a run: config, vocabulary, model and history.

Commands that only read a model also accept its folder: config, vocabulary, and one file with the
parameters instead of checkpoints and history (`lstm_jax.convert` writes it); or the name of a
folder in the package.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config
from lstm_jax.data import files
from lstm_jax.ensemble import Ensemble
from lstm_jax.errors import UserError, make_command, warn
from lstm_jax.run import cell_file, model_file
from lstm_jax.vocabulary import Vocabulary

CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
CHECKPOINTS = "checkpoints"
MODEL = "model.safetensors"
METRICS = "metrics.jsonl"
SAMPLES = "samples.txt"
CURVES = "curves.png"
# Files that a run appends to. A checkpoint holds their sizes, so that a run that resumes from it
# first removes what was appended later. TensorBoard hides what was.
HISTORY = (METRICS, SAMPLES)
# The folders of trained models in the package.
_PRETRAINED = Path(__file__).parents[1] / "pretrained"


def expand_path(directory: Path | str) -> Path:
    """Return a path with the home directory for ~, which the shell leaves in --workdir=~/run."""
    return Path(os.path.expanduser(directory))


def find_model(name: Path | str) -> Path:
    """Return the directory of a trained model: a path, or that of a name in the package."""
    path = expand_path(name)
    is_packaged = path.name == str(path) and not path.exists() and (_PRETRAINED / path).is_dir()
    return _PRETRAINED / path if is_packaged else path


def load_config(workdir: Path) -> Config:
    """Return the config of the run in `workdir`; raise `UserError` if there is no run."""
    try:
        fields = files.read_json(workdir / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there is no trained model in {str(workdir)!r} (no {CONFIG}): name the directory of a "
            f"training run, or tiny-shakespeare, or train one with {make_command('main')}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / CONFIG} is damaged: {error}") from None
    return config_lib.complete_config(fields)


def load_vocabulary(workdir: Path) -> Vocabulary:
    """Return the vocabulary of the run in `workdir`; raise `UserError` if it has none."""
    try:
        fields = files.read_json(workdir / VOCABULARY)
        return Vocabulary.from_fields(fields)
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / VOCABULARY} is missing or damaged: {error}") from None


def load_params(workdir: Path, shapes: Any) -> tuple[model_lib.Params, int]:
    """Return the best parameters of a run, and their step; of a folder, those of its file.

    `shapes` is from `model.get_param_shapes`.
    """
    # A run may hold weights for another program under this name.
    if (workdir / MODEL).exists() and not (workdir / CHECKPOINTS).exists():
        return model_file.read_params(workdir / MODEL, shapes)
    # A folder does not need Orbax, whose import takes half a second.
    from lstm_jax.run import checkpoints

    return checkpoints.restore_best_params(workdir / CHECKPOINTS, shapes)


class Trained(NamedTuple):
    """A trained model, read from a working directory or a folder."""

    config: Config
    vocabulary: Vocabulary
    model: Any  # A `LanguageModel`, or an `Ensemble` of several.
    params: Any  # `Params`, or a tuple of those of an ensemble's members.
    step: int


def load_trained(workdir: Path | str, dtype: str | None = None) -> Trained:
    """Load the model in `workdir`: its best checkpoint by validation loss, else its latest.

    `workdir` may also be a folder, or the name of a model in the package.

    Its matmuls are in `dtype`, a value of `config.model.dtype`; by default the config's.

    Raises:
      UserError: if there is none, or a file is damaged, or its cell is in a file that was not
        loaded (`cell_file.load_cell`).
    """
    workdir = find_model(workdir)
    config, vocabulary = load_config(workdir), load_vocabulary(workdir)
    fields = cell_file.use_loaded_cell(config.model, workdir)
    # The run may have used another kind of device.
    fields = dataclasses.replace(fields, recurrence="auto")
    if dtype:
        fields = dataclasses.replace(fields, dtype=cast(config_lib.Dtype, dtype))
    config = dataclasses.replace(config, model=fields)
    model = model_lib.make_model(config.model, len(vocabulary), vocabulary.stop_id)
    model_lib.check_model(model)
    params, step = load_params(workdir, model_lib.get_param_shapes(model))
    return Trained(config, vocabulary, model, params, step)


def load_models(
    workdirs: Sequence[Path | str], dtype: str | None = None
) -> tuple[Trained, list[int]]:
    """Load the model in each directory: the only one, or an `Ensemble` of all; return their steps.

    For `dtype`, see `load_trained`.

    Raises:
      UserError: as `load_trained`, or if there is no directory, or the vocabulary, the text or its
        splits differ.
    """
    if not workdirs:
        raise UserError("no model is given: name the directory of one")
    first, *others = members = [load_trained(path, dtype) for path in workdirs]
    for path, other in zip(workdirs[1:], others, strict=True):
        ours, theirs = ((t.vocabulary.to_fields(), t.config.data.sha256) for t in (first, other))
        if ours != theirs:
            raise UserError(
                f"{workdirs[0]} and {path} have different texts, splits or vocabularies: the "
                "models of an ensemble must be trained on one text, with one vocabulary"
            )
    if others:
        models, params = zip(*((member.model, member.params) for member in members), strict=True)
        first = first._replace(model=Ensemble(models), params=params)
    return first, [member.step for member in members]


def save_fields(workdir: Path, config: Config, vocabulary: Vocabulary) -> None:
    """Write the files that `load_config` and `load_vocabulary` read."""
    files.write_json(workdir / VOCABULARY, vocabulary.to_fields(), indent=0)
    files.write_json(workdir / CONFIG, config.to_dict())


def append_sample(workdir: Path, step: int, temperature: float, text: str) -> None:
    """Record the text that was generated after `step`."""
    with (workdir / SAMPLES).open("ab") as file:
        file.write(f"=== step {step}, temperature {temperature}\n{text}\n\n".encode())


def measure_history(workdir: Path) -> dict[str, int]:
    """Flush the files that a run appends to, and return their sizes in bytes by name."""
    sizes = {}
    for name in HISTORY:
        with contextlib.suppress(FileNotFoundError), (workdir / name).open("rb") as file:
            os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
    return sizes


def restore_history(workdir: Path, sizes: Mapping[str, int]) -> None:
    """Remove what was appended since `measure_history` gave `sizes`; warn if content is lost."""
    for name in HISTORY:
        path, size = workdir / name, sizes.get(name, 0)
        length = path.stat().st_size if path.exists() else 0
        if length > size:
            os.truncate(path, size)
        elif length < size:
            warn(f"{path} has lost some of its content")
