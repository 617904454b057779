"""Set up JAX in a command: its cache of compiled functions, CPU devices, and memory."""

import contextlib
import ctypes
import dataclasses
import os
import warnings

import jax

from lstm_jax import model as model_lib
from lstm_jax import user_cache
from lstm_jax.config import Config
from lstm_jax.ops import choice
from lstm_jax.ops.processor import count_cores

# Sizes for which dividing a batch over CPU cores is faster than using all cores for each matmul, in
# `benchmarks/train_step.py` on two cores. Matmuls of smaller layers end before threads can share
# them; larger layers read each kernel from memory once per device. The library divides the work of
# a layer itself, so that devices need not exchange gradients.
_SMALLEST_HIDDEN, _LARGEST_HIDDEN, LARGEST_HIDDEN_IN_C = 64, 768, 448
_SMALLEST_PART = 16
# Options of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP = 2**26  # Bytes of a heap, from which a thread other than the main one allocates.


def use_cache() -> None:
    """Cache compiled functions in JAX_COMPILATION_CACHE_DIR, else in the user's cache directory.

    JAX's key of an entry includes the instruction sets of the CPU, because a home directory may be
    shared. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Damaged entries are silently
    compiled again.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # Most take less than 1 s.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):  # Without a directory, nothing is cached.
        directory = user_cache.make_directory("compiled")
        jax.config.update("jax_compilation_cache_dir", str(directory))


def use_cores(config: Config) -> None:
    """Make a CPU device for each core, of which a mesh uses as many as train fastest.

    Call it before anything else uses JAX; later, or with a GPU or TPU, it has no effect.
    """
    num_devices = jax.config.values["jax_num_cpu_devices"]  # The caller may have set it.
    with contextlib.suppress(RuntimeError):  # JAX has made its devices already.
        jax.config.update("jax_num_cpu_devices", max(count_cores(), config.mesh.data, num_devices))
    if config.model.hidden_size > LARGEST_HIDDEN_IN_C:
        # Steps on one device then run in the main thread, for which `keep_freed_memory` keeps
        # arrays of any size; smaller models gain more from steps that run while Python prepares the
        # next.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def count_useful_cores(config: Config) -> int:
    """Return the number of CPU devices that train fastest."""
    batch_size, hidden_size = config.batches.batch_size, config.model.hidden_size
    if not _SMALLEST_HIDDEN <= hidden_size <= _LARGEST_HIDDEN:
        return 1
    # All processes must choose the same, and the library may run only in some of them.
    is_alone = jax.process_count() == 1
    if is_alone and hidden_size > LARGEST_HIDDEN_IN_C and config.model.recurrence in ("auto", "c"):
        model = model_lib.make_model(dataclasses.replace(config.model, recurrence="auto"), 1)
        gating, dtype = model.gating, model.dtype
        if gating and choice.runs_in_c("windows", dtype, hidden_size, gating.name):
            return 1
    return min(count_cores(), max(batch_size // _SMALLEST_PART, 1))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a training step on a CPU frees, for the next step.

    A step allocates tens to hundreds of megabytes. If the operating system provides them each time,
    every 4 KiB cost a page fault, a tenth of a step or more (docs/speed.md). What does not fit into
    a heap of another thread than the main one is not kept: see `use_cores`. Without glibc, or on a
    GPU or TPU, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() != "cpu" or mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _HEAP)  # Otherwise a heap that is empty after a step is returned.
