"""Compile lstm.c, a library for CPUs with AVX-512, at its first use, and load it.

`in_c` calls its functions; `choice` says when; `xla` computes the same without it.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from lstm_jax import user_cache
from lstm_jax.errors import UserError, warn
from lstm_jax.ops.processor import count_cores, read_cpu_features

_SOURCE = Path(__file__).with_name("lstm.c")
_FLAGS = [f"-mavx512{name}" for name in ("f", "bw", "vl", "dq")]
_FLAGS += ["-mfma", "-O3", "-std=gnu11", "-shared", "-fPIC"]


class Library(NamedTuple):
    """The library, loaded into this process."""

    name: str  # Begins the names by which compiled programs call its functions.
    uses_amx: bool  # Whether the processor has AMX and the system permits it.


def count_threads() -> int:
    """Return how many threads each device may use in the program that is being traced."""
    devices = max(jax.sharding.get_abstract_mesh().size // jax.process_count(), 1)
    return max(count_cores() // devices, 1)


@functools.cache
def load_library() -> Library | None:
    """Register the library's functions with XLA; return None if it can't run here.

    It warns if this processor supports the library, but it can't be built or loaded.
    """
    if not is_supported():
        return None
    try:
        path = build_library()
        library = ctypes.CDLL(str(path))
    except (OSError, UserError) as error:
        warn(f"LSTMs run without the library in C, which is faster: {error}")
        return None
    for name in ("matmul", "cross_entropy", "step", "forward", "backward"):
        function = jax.ffi.pycapsule(library[f"lstm_{name}"])
        jax.ffi.register_ffi_target(f"{path.stem}-{name}", function, platform="cpu")
    has_amx = "amx_bf16" in read_cpu_features()
    return Library(path.stem, has_amx and bool(library.lstm_ask_for_amx()))


def is_supported() -> bool:
    """Return whether this processor has what the library needs in float32."""
    return {"avx512bw", "avx512dq", "avx512vl"} <= read_cpu_features()


def build_library() -> Path:
    """Compile the library, unless the user's cache holds it, and return its path.

    Its name has jaxlib's version, whose interface it uses, and a hash of its source.

    Raises:
      UserError: if there is no compiler, or it fails, or the cache can't be used.
    """
    digest = hashlib.sha256("\n".join((_SOURCE.read_text(), *_FLAGS)).encode()).hexdigest()
    directory = user_cache.make_directory("library")
    if not directory:
        raise UserError("it needs a cache directory: set one in XDG_CACHE_HOME")
    path = directory / f"lstm-{jaxlib.__version__}-{digest[:16]}.so"
    if path.exists():
        return path
    try:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            built = Path(folder, path.name)
            _compile(built)
            with built.open("rb") as file:
                os.fsync(file.fileno())  # Loading half a library would end the process.
            built.rename(path)  # Another process may have built the same.
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    return path


def _compile(path: Path) -> None:
    command = ["cc", *_FLAGS, "-I", jax.ffi.include_dir(), str(_SOURCE), "-o", str(path)]
    try:
        env = os.environ | {"LC_ALL": "C"}  # For messages in English.
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
    except OSError as error:
        raise UserError(
            f"the C compiler cc can't be run ({error.strerror}): install gcc or clang"
        ) from None
    if result.returncode:
        lines = result.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), "it fails")
        raise UserError(f"the C compiler cc can't compile {_SOURCE}: {reason}")
