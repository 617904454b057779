"""Keep the memory that a training step frees for the next step."""

import ctypes

import jax

# Options of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP = 2**26  # Bytes of a heap, from which a thread other than the main one allocates.


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a training step on a CPU frees, for the next step.

    A step allocates tens to hundreds of megabytes. If the operating system provides them each time,
    every 4 KiB cost a page fault, a tenth of a step or more (docs/speed.md). What does not fit into
    a heap of another thread than the main one is not kept: see `parallel.use_cores`. Without
    glibc, or on a GPU or TPU, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() != "cpu" or mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _HEAP)  # Otherwise a heap that is empty after a step is returned.
