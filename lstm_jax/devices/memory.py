"""Keep the memory that a training step frees for the next step."""

import ctypes

import jax

# Options of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a training step on a CPU frees, for the next step.

    A step allocates tens to hundreds of megabytes. If the operating system provides them each time,
    every 4 KiB cost a page fault: 3 % of a step at the sizes of experiments/shakespeare.py
    and 16 % at those of quick.py, as benchmarks/train_step.py measures with and without this call.
    Without glibc, or on a GPU or TPU, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() != "cpu" or mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
