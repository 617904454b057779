"""Read and write the parameters of a model as one file, in the format of safetensors.

The file is the length of a header (8 bytes, little-endian), the header (JSON), and the arrays one
after the other. Its metadata hold the training step, and the SHA-256 of the step and the arrays.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import model as model_lib
from lstm_jax.data import files
from lstm_jax.errors import UserError, name_failure
from lstm_jax.model import Params

# The dtypes of a file: by name, that of the format, and NumPy's.
_DTYPES = {"float32": ("F32", np.dtype("float32")), "bfloat16": ("BF16", np.dtype(jnp.bfloat16))}
DTYPES = tuple(_DTYPES)
_HEADER_LIMIT = 2**22  # Bytes; an array takes about 100.


def write_params(path: Path, params: Params, step: int, dtype: str) -> None:
    """Write parameters of a training step, rounded to one of `DTYPES`; raise `OSError`."""
    arrays = [np.asarray(array, _DTYPES[dtype][1]).tobytes() for array in jax.tree.leaves(params)]
    data = b"".join(arrays)
    checksum = hashlib.sha256(str(step).encode() + data).hexdigest()
    metadata = {"step": str(step), "sha256": checksum}
    header = json.dumps({"__metadata__": metadata, **_describe(params, dtype)}).encode()
    header += b" " * (-len(header) % 8)  # Aligns the arrays.
    files.write_file(path, len(header).to_bytes(8, "little") + header + data)


def read_params(path: Path, params: Params) -> tuple[Params, int]:
    """Return float32 parameters, and their step.

    The file may come from someone else. So its header and its size are compared with `params`, the
    expected arrays or `jax.ShapeDtypeStruct`s, before the arrays are read.

    Raises:
      UserError: if it can't be read, is damaged, or does not hold such arrays.
    """
    leaves, tree = jax.tree.flatten(params)
    arrays = []
    try:
        with name_failure(f"can't read {path}"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _HEADER_LIMIT)))
            metadata = header.pop("__metadata__")
            dtypes = [dtype for dtype in DTYPES if _describe(params, dtype) == header]
            if not dtypes:
                raise UserError(f"{path} does not hold the model that the config describes")
            dtype = _DTYPES[dtypes[0]][1]
            size = 8 + length + dtype.itemsize * sum(leaf.size for leaf in leaves)
            if path.stat().st_size != size:
                raise ValueError
            digest = hashlib.sha256(metadata["step"].encode())
            for leaf in leaves:
                content = file.read(dtype.itemsize * leaf.size)
                digest.update(content)
                array = np.frombuffer(content, dtype).reshape(leaf.shape)
                arrays.append(jnp.asarray(array, jnp.float32))
        if metadata["sha256"] != digest.hexdigest():
            raise ValueError
        step = int(metadata["step"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is damaged, or not a model of lstm_jax.convert: restore it from a copy"
        ) from None
    restored: Params = jax.tree.unflatten(tree, arrays)
    if not model_lib.is_finite(restored):
        raise UserError(f"the parameters in {path} are not finite")
    return restored, step


def _describe(params: Params, dtype: str) -> dict[str, object]:
    """Return the header of a file with these parameters, without its metadata."""
    (name, kind), end = _DTYPES[dtype], 0
    header: dict[str, object] = {}
    for path, array in jax.tree.leaves_with_path(params):
        begin, end = end, end + kind.itemsize * array.size
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        header[key] = {"dtype": name, "shape": [*array.shape], "data_offsets": [begin, end]}
    return header
