"""Keep compiled functions on disk for the next process."""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax


def use_cache() -> None:
    """Cache compiled functions in JAX_COMPILATION_CACHE_DIR, else in the user's cache directory.

    There is one directory for each kind of processor: what XLA compiles for one CPU may crash on
    another, and a home directory may be shared. JAX_ENABLE_COMPILATION_CACHE=false turns the cache
    off, as does a directory that can't be written. Damaged entries are silently compiled again.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # This user has no home directory.
        return
    digest = hashlib.sha256(_describe_processor().encode()).hexdigest()
    directory = Path(cache, "lstm-jax", f"compiled-{digest[:16]}")
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(directory))


def _describe_processor() -> str:
    """Return the processor's model and instruction sets, as far as the system knows them."""
    names = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return "".join(sorted({line for line in file if line.partition(":")[0].strip() in names}))
    return f"{platform.machine()} {platform.processor()}"
