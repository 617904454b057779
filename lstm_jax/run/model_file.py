"""Read and write the parameters of a model as one file, in the format of safetensors.

Its metadata hold the training step, and the SHA-256 of the step and the arrays.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lstm_jax import model as model_lib
from lstm_jax.data import files
from lstm_jax.errors import UserError, name_failure
from lstm_jax.model import Params


def write_params(path: Path, params: Params, step: int, dtype: str) -> None:
    """Write parameters of a training step, rounded to `dtype`; raise `OSError`."""
    leaves = _name_leaves(params).items()
    arrays = {name: np.asarray(array, dtype, order="C") for name, array in leaves}
    metadata = {"step": str(step), "sha256": _checksum(str(step), arrays.values())}
    files.write_file(path, safetensors.numpy.save(arrays, metadata))


def read_params(path: Path, params: Params) -> tuple[Params, int]:
    """Return float32 parameters of the shapes of `params`, and their step.

    Raise `UserError` if the file is damaged, or does not hold such arrays.
    """
    expected = _name_leaves(params)
    try:
        with (
            name_failure(f"can't read {path}"),
            safetensors.safe_open(files.check_file(path), "numpy") as file,
        ):
            metadata = file.metadata()
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(array.get_shape()) for name, array in slices.items()}
            if shapes != {name: leaf.shape for name, leaf in expected.items()}:
                raise UserError(f"{path} does not hold the model that the config describes")
            # The checksum does not cover the dtypes; `write_params` writes these two, of two sizes.
            if not {array.get_dtype() for array in slices.values()} <= {"F32", "BF16"}:
                raise ValueError
            arrays = [file.get_tensor(name) for name in expected]
        if metadata["sha256"] != _checksum(metadata["step"], arrays):
            raise ValueError
        step, leaves = int(metadata["step"]), [jnp.asarray(array, jnp.float32) for array in arrays]
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged, or not a model of lstm_jax.convert: restore it from a copy"
        ) from None
    restored: Params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    if not model_lib.is_finite(restored):
        raise UserError(f"the parameters in {path} are not finite")
    return restored, step


def _name_leaves(params: Params) -> dict[str, jax.Array]:
    """Return the arrays by the names that they have in a file."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(at, simple=True, separator="."): leaf for at, leaf in leaves}


def _checksum(step: str, arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256(step.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
