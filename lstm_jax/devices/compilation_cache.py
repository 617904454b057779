"""Keep compiled functions on disk for the next process."""

import contextlib
import hashlib
import os
import platform
import warnings

import jax

from lstm_jax import user_cache


def use_cache() -> None:
    """Cache compiled functions in JAX_COMPILATION_CACHE_DIR, else in the user's cache directory.

    There is one directory for each kind of processor: what XLA compiles for one CPU may crash on
    another, and a home directory may be shared. JAX_ENABLE_COMPILATION_CACHE=false turns the cache
    off. Damaged entries are silently compiled again.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # Most take less than 1 s.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if directory := user_cache.make_directory(f"compiled-{hash_processor()}"):
        jax.config.update("jax_compilation_cache_dir", str(directory))


def hash_processor() -> str:
    """Return a hash of the processor's model and instruction sets, as the system knows them."""
    description = f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = {line for line in file if line.partition(":")[0].strip() in names}
        description = "".join(sorted(lines))
    return hashlib.sha256(description.encode()).hexdigest()[:16]
