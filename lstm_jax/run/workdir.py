"""Read and write the working directory of a run: config, vocabulary, model and history.

Commands that only read a model also accept its folder: config, vocabulary, and one file with the
parameters instead of checkpoints and history (`lstm_jax.convert` writes it); or the name of a
folder in the package.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config
from lstm_jax.data import files
from lstm_jax.devices import processes
from lstm_jax.errors import UnavailableError, UserError, make_command, name_failure, warn
from lstm_jax.vocabulary import Vocabulary

CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
CHECKPOINTS = "checkpoints"
MODEL = "model.safetensors"
METRICS = "metrics.jsonl"
SAMPLES = "samples.txt"
CURVES = "curves.png"
# Files that a run appends to. A checkpoint holds their sizes, so that a run that resumes from it
# first removes what was appended later. TensorBoard hides rows that were repeated.
HISTORY = (METRICS, SAMPLES)
_LOCK = ".lock"
_PRETRAINED = Path(__file__).parents[1] / "pretrained"  # Folders of models.


class Row(TypedDict):
    """A row of metrics.jsonl: a loss in nats per token after `step` training steps."""

    step: int
    epoch: float  # The number of passes over the training text, with fractions.
    split: str
    loss: float
    learning_rate: NotRequired[float]
    gradient_norm: NotRequired[float]
    tokens_per_second: NotRequired[float]
    bits_per_character: NotRequired[float]
    sample: NotRequired[str]  # The text of a validation, for TensorBoard and `watch` only.
    seconds: float  # Of training so far.
    time: str  # In UTC.


def expand_path(directory: Path | str) -> Path:
    """Return a path with the home directory for ~, which the shell leaves in --workdir=~/run."""
    return Path(os.path.expanduser(directory))


def find_model(name: Path | str) -> Path:
    """Return the directory of a trained model: a path, or that of a name in the package."""
    path = expand_path(name)
    is_packaged = path.name == str(path) and not path.exists() and (_PRETRAINED / path).is_dir()
    return _PRETRAINED / path if is_packaged else path


@contextlib.contextmanager
def hold_lock(directory: Path) -> Iterator[str]:
    """Make `directory` and hold its lock, for all processes of a run; yield what is in its file.

    The operating system releases it with the process, however it ends. On a file system without
    locks, nothing is locked. Raise `UnavailableError` if a process of another run holds it, or the
    directory can't be written.
    """
    path = directory / _LOCK
    if not processes.is_first():
        yield path.read_text() if path.exists() else ""
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UnavailableError(f"can't write to {directory}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(
                f"another process is training in {directory} ({path.read_text().strip()}): wait "
                "until it ends, stop it, or use another working directory"
            ) from None
        except OSError:
            pass  # The file system has no locks.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
        for name in (CONFIG, VOCABULARY, CURVES):  # A killed process can leave them.
            for partial in directory.glob(f".{name}.*.partial"):  # From `files.write_file`.
                partial.unlink()
        yield path.read_text()


def has_run(directory: Path) -> bool:
    """Return whether a run in `directory` can resume; raise `UserError` if some files are gone."""
    paths = (directory / name for name in (CONFIG, *HISTORY, MODEL))
    # A run that is killed in its first save leaves an empty file of metrics.
    has_config, *others = (path.exists() and path.stat().st_size > 0 for path in paths)
    has_checkpoint = bool(list_steps(directory / CHECKPOINTS))
    if (has_checkpoint or any(others)) and not (has_checkpoint and has_config):
        missing = CHECKPOINTS if has_config else CONFIG
        raise UserError(
            f"{directory} holds no complete run: restore {missing}, or use another working "
            "directory"
        )
    return has_checkpoint


def list_steps(checkpoints: Path) -> list[int]:
    """Return the steps of all checkpoints in order."""
    names = [path.name for path in checkpoints.glob("*/")]
    return sorted(int(name) for name in names if name.isdecimal())


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
    # Fields of earlier versions.
    fields.pop("steps_per_call", None)
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        fields["model"].pop("cell_sha256")
    return config_lib.complete_config(fields)


def load_vocabulary(workdir: Path) -> Vocabulary:
    """Return the vocabulary of the run in `workdir`; raise `UserError` if it has none."""
    try:
        fields = files.read_json(workdir / VOCABULARY)
        return Vocabulary.from_fields(fields)
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / VOCABULARY} is missing or damaged: {error}") from None


def read_params(path: Path, params: model_lib.Params) -> tuple[model_lib.Params, int]:
    """Return float32 parameters of the shapes of `params`, and their step.

    Raise `UserError` if the file is damaged, or does not hold such arrays.
    """
    leaves_by_name = _name_leaves(params)
    try:
        with (
            name_failure(f"can't read {path}"),
            safetensors.safe_open(files.check_file(path), "numpy") as file,
        ):
            metadata = file.metadata()
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(array.get_shape()) for name, array in slices.items()}
            if shapes != {name: leaf.shape for name, leaf in leaves_by_name.items()}:
                raise UserError(f"{path} does not hold the model that the config describes")
            # The checksum does not cover the dtypes; `write_params` writes these two, of two sizes.
            if not {array.get_dtype() for array in slices.values()} <= {"F32", "BF16"}:
                raise ValueError
            arrays = [file.get_tensor(name) for name in leaves_by_name]
        if metadata["sha256"] != _checksum(metadata["step"], arrays):
            raise ValueError
        step, leaves = int(metadata["step"]), [jnp.asarray(array, jnp.float32) for array in arrays]
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged, or not a model of lstm_jax.convert: restore it from a copy"
        ) from None
    new_params: model_lib.Params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    if not model_lib.is_finite(new_params):
        raise UserError(f"the parameters in {path} are not finite")
    return new_params, step


def write_params(path: Path, params: model_lib.Params, step: int, dtype: str) -> None:
    """Write parameters of a training step, rounded to `dtype`, to one file of safetensors.

    Its metadata hold the step, and the SHA-256 of the step and the arrays. Raise `OSError`.
    """
    leaves = _name_leaves(params).items()
    arrays = {name: np.asarray(array, dtype, order="C") for name, array in leaves}
    metadata = {"step": str(step), "sha256": _checksum(str(step), arrays.values())}
    files.write_file(path, safetensors.numpy.save(arrays, metadata))


def _name_leaves(params: model_lib.Params) -> dict[str, jax.Array]:
    """Return the arrays by the names that they have in a file."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(at, simple=True, separator="."): leaf for at, leaf in leaves}


def _checksum(step: str, arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256(step.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_fields(workdir: Path, config: Config, vocabulary: Vocabulary) -> None:
    """Write the files that `load_config` and `load_vocabulary` read."""
    files.write_json(workdir / VOCABULARY, vocabulary.to_fields(), indent=0)
    files.write_json(workdir / CONFIG, config.to_dict())


def read_metrics(workdir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl; [] if the file does not exist.

    An incomplete last line, which is still being written, is left out. Raise `UserError` if the
    file can't be read, or a line is not JSON.
    """
    path = workdir / METRICS
    with name_failure(f"can't read {path}"):
        content = files.check_file(path).read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in content.split(b"\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, remove the line that is not JSON: {error}") from None


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


def truncate_history(workdir: Path, sizes: Mapping[str, int]) -> None:
    """Remove what was appended since `measure_history` gave `sizes`; warn if content is lost."""
    for name in HISTORY:
        path, size = workdir / name, sizes.get(name, 0)
        length = path.stat().st_size if path.exists() else 0
        if length > size:
            os.truncate(path, size)
        elif length < size:
            warn(f"{path} has lost some of its content")
