"""Compile lstm.c, a library for CPUs with AVX-512, AVX2 or NEON, at its first use, and load it.

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
from lstm_jax.errors import UserError, name_failure, warn
from lstm_jax.ops.processor import count_cores, read_cpu_features

_SOURCE = Path(__file__).with_name("lstm.c")
# Of any program; those of a library are added.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast"]
_AVX512 = "avx512f avx512bw avx512vl avx512dq"
_AVX512_FLAGS = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
# Features of processors, the best ones first, and the flags with which the library uses them. It
# multiplies bfloat16 with those that have "bf16".
SETS = (
    (f"{_AVX512} avx512_bf16 amx_bf16", f"{_AVX512_FLAGS} -mavx512bf16 -mamx-tile -mamx-bf16"),
    (f"{_AVX512} avx512_bf16", f"{_AVX512_FLAGS} -mavx512bf16"),
    (_AVX512, _AVX512_FLAGS),
    ("avx2 fma", "-mavx2 -mfma"),
    ("asimd bf16", "-march=armv8.2-a+bf16"),
    ("asimd", ""),
)
_TIMEOUT = 60  # Seconds for the compiler, which takes a few.


class Library(NamedTuple):
    """The library, loaded into this process."""

    name: str  # Begins the names by which compiled programs call its functions.
    lanes: int  # Numbers in a vector.
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
    flags = list_flags()
    if flags is None:
        return None
    try:
        path = build_library(flags)
        library = ctypes.CDLL(str(path))
    except (OSError, UserError) as error:
        warn(f"layers run without the library in C, which is faster: {error}")
        return None
    for name in ("matmul", "cross_entropy", "step", "forward", "backward"):
        function = jax.ffi.pycapsule(library[f"lstm_{name}"])
        jax.ffi.register_ffi_target(f"{path.stem}-{name}", function, platform="cpu")
    return Library(path.stem, library.lstm_count_lanes(), bool(library.lstm_ask_for_amx()))


def list_flags() -> list[str] | None:
    """Return the compiler's flags for this processor; None if it can't run the library."""
    features = read_cpu_features()
    usable = (flags for needed, flags in SETS if features.issuperset(needed.split()))
    return next(([*FLAGS, *flags.split()] for flags in usable), None)


def list_dtypes() -> list[str]:
    """Return the dtypes in which the library can multiply on this processor."""
    flags = list_flags()
    if flags is None:
        return []
    return ["float32", "bfloat16"] if any("bf16" in flag for flag in flags) else ["float32"]


def build_library(flags: list[str]) -> Path:
    """Compile the library, unless the user's cache holds it, and return its path.

    Its name has jaxlib's version, whose interface it uses, a hash of its source, and one of its
    content: loading a damaged library would end the process, or compute something else.

    Raises:
      UserError: if there is no compiler, or it fails, or the cache can't be used.
    """
    source = [path.read_bytes() for path in (_SOURCE, _SOURCE.with_name("platform.h"))]
    name = f"lstm-{jaxlib.__version__}-{_hash(*source, *map(str.encode, flags))}"
    with name_failure("can't use lstm-jax/library in XDG_CACHE_HOME or ~/.cache"):
        directory = user_cache.make_directory("library")
        for path in directory.glob(f"{name}-*.so"):
            if path.stem == f"{name}-{_hash(path.read_bytes())}":
                return path
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            built = Path(folder, "lstm.so")
            _compile(built, flags)
            # It replaces a damaged one, or one that another process has built.
            return built.rename(directory / f"{name}-{_hash(built.read_bytes())}.so")


def _hash(*content: bytes) -> str:
    return hashlib.sha256(b"\n".join(content)).hexdigest()[:16]


def make_command(flags: list[str], compiler: str = "cc") -> list[str]:
    """Return the command that compiles the library, without its output."""
    return [compiler, *flags, "-I", jax.ffi.include_dir(), str(_SOURCE)]


def _compile(path: Path, flags: list[str]) -> None:
    command = [*make_command(flags), "-shared", "-fPIC", "-o", str(path)]
    env = os.environ | {"LC_ALL": "C"}  # For messages in English.
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=env, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the C compiler cc takes more than {_TIMEOUT} seconds") from None
    except OSError as error:
        raise UserError(
            f"the C compiler cc can't be run ({error.strerror}): install gcc or clang"
        ) from None
    if result.returncode:
        lines = result.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), "it fails")
        raise UserError(f"the C compiler cc can't compile {_SOURCE}: {reason}")
