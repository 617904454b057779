"""Keep compiled functions on disk for the next process."""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

from lstm_jax.errors import warn


def use_cache() -> None:
    """Cache compiled functions in JAX_COMPILATION_CACHE_DIR, else in the user's cache directory.

    There is one directory for each kind of processor: what XLA compiles for one CPU may crash on
    another, and a home directory may be shared. JAX_ENABLE_COMPILATION_CACHE=false turns the cache
    off, as does a directory that can't be written, and with a warning one that others can write:
    entries are machine code. Damaged entries are silently compiled again.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # This user has no home directory.
        return
    directory = Path(cache, "lstm-jax", f"compiled-{hash_processor()}")
    with contextlib.suppress(OSError):
        directory.mkdir(0o700, parents=True, exist_ok=True)
        status = directory.lstat()  # A link may lead to a directory of someone else.
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or directory.is_symlink():
            warn(
                f"others can write to {directory}, so compiled functions are not kept there: "
                "remove it, or set another directory in JAX_COMPILATION_CACHE_DIR"
            )
        elif os.access(directory, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(directory))


def hash_processor() -> str:
    """Return a hash of the processor's model and instruction sets, as the system knows them."""
    description = f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = {line for line in file if line.partition(":")[0].strip() in names}
        description = "".join(sorted(lines))
    return hashlib.sha256(description.encode()).hexdigest()[:16]
