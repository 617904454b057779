"""Seal a directory of arrays with checksums, and find later changes.

A sealed directory may come from someone else. So before its arrays are read, its files are checked
against the parameters that are expected: regular files, no links, and of a size that fits, before
and after they are unpacked.

Orbax stores an array in Zarr's format 2: a directory with metadata, .zarray, and chunks that zstd
has compressed, such as 0.0. TensorStore, which reads it, stops where a chunk unpacks to more than
its shape. It limits neither that shape nor what other kinds of compression unpack to.
"""

import contextlib
import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts

from lstm_jax.data import files
from lstm_jax.errors import one_line

SEAL = "SHA256SUMS"
# Written after the checkpoint is sealed, so the seal does not cover it.
VALIDATION = "validation.json"

# Limits of file sizes in bytes: SHA256SUMS, and other files without arrays.
_SEAL_LIMIT, _METADATA_LIMIT = 2**24, 2**24
# Limit of a checkpoint's size: a multiple of its parameters (Adam's state has twice their size, a
# moving average once), and bytes beyond that, for the carry of any batch.
_PARAMS_MULTIPLE, _BYTES_BEYOND = 8, 2**36
# Orbax compresses arrays. Trained parameters shrink by a tenth, by half if they were rounded to
# bfloat16. Zeros would shrink to nothing, and a small file could fill the memory: so parameters of
# more than `_SMALL` bytes must take at least this share of their size.
_LEAST_SHARE, _SMALL = 1 / 8, 2**26
# The metadata of an array, and the limit of its chunks, of which each device writes one.
ARRAY, _CHUNKS = ".zarray", 2**16


def seal_checkpoint(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to disk, and write its checksum to SHA256SUMS."""
    names = [name for name in _list(checkpoint) if not _is_hidden(name)]
    sums = {name: files.hash_file(checkpoint / name, sync=True) for name in names}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    files.write_file(checkpoint / SEAL, lines.encode())


def find_damage(checkpoint: Path, params: object = ()) -> str | None:
    """Return how a checkpoint's files differ from those that were sealed; None if they don't.

    Hidden files need no checksum: file managers add them. Sizes that don't fit `params`, the arrays
    or `jax.ShapeDtypeStruct`s of a run, are damage too: sizes of files are checked before these are
    read, sizes of arrays before these are unpacked.
    """
    needed = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params))
    limit = _PARAMS_MULTIPLE * needed + _BYTES_BEYOND  # Of the files, and of the arrays.
    try:
        lines = files.read_bytes(checkpoint / SEAL, _SEAL_LIMIT).decode().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        sizes = _list(checkpoint)
        others = sums.keys() ^ sizes.keys()
        if others := {name for name in others if name in sums or not _is_hidden(name)}:
            name = min(others)
            return f"{name} is missing" if name in sums else f"{SEAL} does not hold {name}"
        if reason := _find_misfit(sizes, needed, limit):
            return reason
        for name in sums:
            if files.hash_file(checkpoint / name) != sums[name]:
                return f"{name} has changed"
        _check_arrays(checkpoint, sizes, limit)
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except Exception as error:  # TensorStore raises many kinds.
        return one_line(error)[:300]
    return None if sums else f"{SEAL} is empty"


def _find_misfit(sizes: Mapping[str, int], needed: int, limit: int) -> str | None:
    """Return why files of these sizes can't have `needed` bytes of parameters; None if they can."""
    for name, size in sizes.items():
        is_chunk = re.search("/[0-9.]+$", name)
        if not is_chunk and size > _METADATA_LIMIT:
            return f"{name} is too large, with {size:,} bytes"
    held = sum(size for name, size in sizes.items() if name.startswith("params/"))
    if needed > _SMALL and held < _LEAST_SHARE * needed:
        return f"its {held:,} bytes can't hold the {needed:,} bytes of the expected parameters"
    if (total := sum(sizes.values())) > limit:
        return f"its files are too large for such a model, with {total:,} bytes"
    return None


def _check_arrays(checkpoint: Path, names: Iterable[str], limit: int) -> None:
    """Check that the arrays in files of these names take at most `limit` bytes of memory.

    Raise an exception, of any kind, if they take more, are in another format, or can't be read.
    """
    total = 0
    for name in names:
        item, _, file = name.rpartition("/")
        # Without the other file, Orbax would read the database that this one is of.
        if file == "manifest.ocdbt":
            raise ValueError(f"{item} is not in directories of Zarr 2")
        if file == "_METADATA":
            fields = json.loads(files.read_bytes(checkpoint / name, _METADATA_LIMIT))
            if fields["use_ocdbt"] is not False or fields["use_zarr3"] is not False:
                raise ValueError(f"{item} is not in directories of Zarr 2")
        if file != ARRAY:
            continue
        store = {"driver": "file", "path": f"{(checkpoint / item).resolve()}/"}
        array: Any = ts.open({"driver": "zarr", "kvstore": store}, open=True).result()
        codec, chunk = array.codec.to_json(), array.chunk_layout.read_chunk.shape or ()
        if codec["filters"] or not codec["compressor"] or codec["compressor"]["id"] != "zstd":
            raise ValueError(f"{item} is not compressed by zstd")
        if any(part > max(whole, 1) for part, whole in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"the chunks of {item} are larger than the array")
        if math.prod(-(-n // m) for n, m in zip(array.shape, chunk, strict=True)) > _CHUNKS:
            raise ValueError(f"{item} has too many chunks")
        total += array.size * array.dtype.numpy_dtype.itemsize
    if total > limit:
        raise ValueError(f"its arrays are too large, with {total:,} bytes")


def _list(checkpoint: Path) -> dict[str, int]:
    """Return the sizes of all files but the seal and the validation loss, by name.

    Raise `ValueError` if there is anything but regular files and directories.
    """
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        with contextlib.suppress(FileNotFoundError):  # A temporary file of `files.write_json`.
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise ValueError(f"{name} is not a regular file")
    return {name: size for name, size in sizes.items() if name not in (SEAL, VALIDATION)}


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") and not name.endswith(f"/{ARRAY}")
