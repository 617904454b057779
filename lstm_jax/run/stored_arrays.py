"""Check the arrays of a checkpoint before they are read: reading them must not fill the memory.

Orbax stores arrays in Zarr's format 2, in chunks that zstd has compressed, as the values of an
OCDBT database: a B+tree, whose nodes are compressed too. TensorStore, which reads it, stops where a
chunk unpacks to more than its shape. It does not limit that shape, other kinds of compression, and
nodes.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from lstm_jax.data import files

# Limits in bytes: of the file about an item; of the metadata of an array; of a key; of a small
# node, unpacked: a block of zstd, whose keys take 600 MB at most; of the memory in which other
# nodes are tried.
_ITEM, _METADATA, _KEY, _SMALL_NODE, _MEMORY = 2**24, 2**16, 2**10, 2**17, 2**29
# Limits of the nodes, values and arrays of an item, and of the chunks of an array, of which each
# device writes one.
_NODES, _VALUES, _ARRAYS, _CHUNKS = 2**6, 2**16, 2**12, 2**16
# A program that reads a node. Its arguments are a directory, a location, and the limit of its
# memory, beyond what it has used before. Only Linux limits it.
_READ = """
import resource, sys
import tensorstore as ts
base = ts.KvStore.open({"driver": "file", "path": sys.argv[1]}).result()
if sys.platform == "linux":
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, 2 * (used + int(sys.argv[3]),))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))  # Seconds.
ts.ocdbt.dump(base, sys.argv[2]).result()
"""


def check_item(item: Path, limit: int) -> None:
    """Check that the arrays of an item, such as "params", take at most `limit` bytes of memory.

    Raise an exception, of any kind, if they take more, are in another format, or can't be read.
    """
    fields = json.loads(files.read_bytes(item / "_METADATA", _ITEM))
    if fields["use_ocdbt"] is not True or fields["use_zarr3"] is not False:
        raise ValueError(f"{item.name} is not a database of Zarr 2")
    base = ts.KvStore.open({"driver": "file", "path": f"{item.resolve()}/"}).result()
    sizes = _measure_values(item, base)
    if sum(sizes.values()) > limit:
        raise ValueError(f"the values of {item.name} are too large")
    database = {"driver": "ocdbt", "base": base.spec().to_json()}
    metadata = [key for key in sizes if key.endswith(b"/.zarray")]
    if len(metadata) > _ARRAYS:
        raise ValueError(f"{item.name} has too many arrays")
    total = 0
    for key in metadata:
        name = key.removesuffix(b"/.zarray").decode()
        if sizes[key] > _METADATA:
            raise ValueError(f"the metadata of {name} are too large")
        kvstore = {**database, "path": f"{name}/"}
        array: Any = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
        codec, chunk = array.codec.to_json(), array.chunk_layout.read_chunk.shape or ()
        if codec["filters"] or not codec["compressor"] or codec["compressor"]["id"] != "zstd":
            raise ValueError(f"{name} is not compressed by zstd")
        if any(part > max(whole, 1) for part, whole in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"the chunks of {name} are larger than the array")
        if math.prod(-(-n // m) for n, m in zip(array.shape, chunk, strict=True)) > _CHUNKS:
            raise ValueError(f"{name} has too many chunks")
        total += array.size * array.dtype.numpy_dtype.itemsize
    if total > limit:
        raise ValueError(f"the arrays of {item.name} are too large, with {total:,} bytes")


def _measure_values(item: Path, base: ts.KvStore) -> dict[bytes, int]:
    """Return the sizes of the values in the database of an item, by key."""
    if [path.name for path in item.glob("manifest.*")] != ["manifest.ocdbt"]:
        raise ValueError(f"{item.name} does not have one manifest")
    if not _is_small(files.read_bytes(item / "manifest.ocdbt", _SMALL_NODE)):
        raise ValueError(f"the manifest of {item.name} is too large")
    locations = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
    sizes: dict[bytes, int] = {}
    for location in locations:  # The list grows.
        _, *path, offset, length = location.split(":")
        with files.open_regular(item / unquote("".join(path))) as file:
            file.seek(int(offset))
            is_small = _is_small(file.read(min(int(length), _SMALL_NODE)))
        if not is_small:
            _try_to_read(item, location)
        for entry in ts.ocdbt.dump(base, location).result()["entries"]:
            if len(entry["key"]) > _KEY:
                raise ValueError(f"a key of {item.name} is too long")
            if "location" in entry:
                locations.append(entry["location"])
            elif "inline_value" in entry:
                sizes[entry["key"]] = len(entry["inline_value"])
            else:
                sizes[entry["key"]] = int(entry["indirect_value"].rpartition(":")[2])
        if len(locations) > _NODES or len(sizes) > _VALUES:
            raise ValueError(f"{item.name} has too many values")
    return sizes


def _is_small(node: bytes) -> bool:
    """Return whether a node or a manifest unpacks to at most `_SMALL_NODE` bytes.

    It does if it is one frame of zstd with one block, which is not a run of one byte (RFC 8878).
    """
    # A magic number, the length, the version (0), the compression (1 is zstd), the frame.
    if node[12:18] != b"\0\1\x28\xb5\x2f\xfd":
        return False
    flags = node[18]
    single, width = flags >> 5 & 1, flags >> 6  # Whether there is no window; the size's width.
    header = 19 + (1 - single) + (2**width if width else single)
    is_last, kind = node[header] & 1, node[header] >> 1 & 3
    return not flags & 3 and bool(is_last) and kind in (0, 2)  # No dictionary; raw or compressed.


def _try_to_read(item: Path, location: str) -> None:
    """Read a node in a process with limited memory; raise `ValueError` if that fails.

    A key is stored as what it shares with the key before it, and the rest. So a node of a megabyte
    can have gigabytes of keys.
    """
    command = [sys.executable, "-c", _READ, f"{item.resolve()}/", location, str(_MEMORY)]
    if subprocess.run(command, capture_output=True).returncode:
        raise ValueError(f"a node of {item.name} can't be read within {_MEMORY:,} bytes")
