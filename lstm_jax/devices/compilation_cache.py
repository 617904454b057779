"""What JAX has compiled, kept on the disk for the next process."""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax


def use_cache() -> None:
    """Lets JAX keep what it compiles where JAX_COMPILATION_CACHE_DIR says, or in `directory()`.

    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Where nothing can be written, it is off too.
    What was damaged there is compiled anew, without a word.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):
            path = directory()
            path.mkdir(parents=True, exist_ok=True)
            if os.access(path, os.W_OK):
                jax.config.update("jax_compilation_cache_dir", str(path))


def directory() -> Path:
    """Below the user's cache directory, one for each kind of processor.

    What XLA compiles for one CPU may crash on another, with which a home directory may be shared.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(_processor().encode()).hexdigest()
    return Path(cache, "lstm-jax", f"compiled-{digest[:16]}")


def _processor() -> str:
    """The processor's model and its instructions, as far as the system tells them."""
    named = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = {line for line in file if line.partition(":")[0].strip() in named}
        return "".join(sorted(lines))
    return f"{platform.machine()} {platform.processor()}"
