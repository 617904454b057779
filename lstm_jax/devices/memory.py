"""Memory of a process that trains on a CPU."""

import ctypes

import jax

# Options of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets glibc keep what a training step on a CPU frees, for the next step to use.

    A step allocates tens to hundreds of megabytes. Had from the operating system anew each time,
    they cost a page fault for every 4 KiB: 3 % of a step at the sizes of experiments/shakespeare.py
    and 16 % at those of quick.py, measured by benchmarks/train_step.py with and without its call of
    this. Where the C library is not glibc, or the device no CPU, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() != "cpu" or mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
