"""Query the processor: its instruction sets, and the cores that this process may use."""

import functools
import os
from pathlib import Path


def has_bfloat16_instructions() -> bool:
    """Return whether this processor has instructions for bfloat16 matmuls (AMX, AVX-512)."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(read_cpu_features())


@functools.cache
def read_cpu_features() -> frozenset[str]:
    """Return the names of this processor's instruction sets; none where /proc is missing."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
