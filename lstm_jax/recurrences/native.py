"""Compile lstm.c, an optional library for CPUs with AVX-512 BF16, and load it.

`python -m lstm_jax.recurrences.native` compiles it, with a C compiler. `in_c` calls its functions;
`fused` computes the same without it.
"""

import ctypes
import functools
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib

from lstm_jax.errors import UserError
from lstm_jax.recurrences.processor import count_cores, read_cpu_features

_SOURCE = Path(__file__).with_name("lstm.c")
_FLAGS = [f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "bf16", "vnni")]
_FLAGS += ["-mfma", "-O3", "-std=gnu11", "-shared", "-fPIC"]
_FUNCTIONS = ("matmul", "step", "forward", "backward")


def count_threads() -> int:
    """Return how many threads each device may use in the program that is being traced."""
    devices = max(jax.sharding.get_abstract_mesh().size // jax.process_count(), 1)
    return max(count_cores() // devices, 1)


@functools.cache
def load_library() -> str:
    """Register the library's functions with XLA; return its name, "" if there is none to run."""
    path = get_path()
    if not is_supported():
        return ""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return ""
    for name in _FUNCTIONS:
        function = jax.ffi.pycapsule(library[f"lstm_{name}"])
        jax.ffi.register_ffi_target(f"{path.stem}-{name}", function, platform="cpu")
    return path.stem


def get_target(name: str) -> str:
    """Return the name by which compiled programs, including cached ones, call a function."""
    return f"{load_library()}-{name}"


def is_supported() -> bool:
    """Return whether this processor has AVX-512 BF16 and VNNI, but not AMX, which XLA can use."""
    features = read_cpu_features()
    return {"avx512_bf16", "avx512_vnni"} <= features and "amx_bf16" not in features


def get_path() -> Path:
    """Return the path of the library. Its name has jaxlib's version and a hash of its source."""
    digest = hashlib.sha256("\n".join((_SOURCE.read_text(), *_FLAGS)).encode()).hexdigest()
    return _SOURCE.with_name(f"lstm-{jaxlib.__version__}-{digest[:16]}.so")


def build_library() -> Path:
    """Compile the library in place of older ones for this jaxlib, and return its path."""
    path = get_path()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder, path.name)
            command = ["cc", *_FLAGS, "-I", jax.ffi.include_dir(), str(_SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            for old in path.parent.glob(f"lstm-{jaxlib.__version__}-*.so"):
                old.unlink()
            built.rename(path)
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), "it fails")
        raise UserError(f"the C compiler cc can't compile {_SOURCE}: {reason}") from None
    except FileNotFoundError:
        raise UserError("there is no C compiler named cc: install gcc or clang") from None
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    return path


def main() -> None:
    """Compile the library and print its path."""
    if not is_supported():
        print("nothing to compile: this is for processors with AVX-512 BF16 and without AMX")
        return
    try:
        print(build_library())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
