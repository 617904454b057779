"""Query the processor: its vendor and instruction sets, and the cores that this process may use."""

import contextlib
import functools
import os
from pathlib import Path


def find_vendor() -> str:
    """Return "Intel" on a processor of Intel, otherwise "AMD"."""
    return "Intel" if "GenuineIntel" in read_cpu_features() else "AMD"


def is_faster_in_bfloat16() -> bool:
    """Return whether this processor multiplies matrices faster in bfloat16 than in float32.

    AMX does, and AMD's AVX-512 BF16. Intel's, measured on Emerald Rapids, is slower.
    """
    features = read_cpu_features()
    return "amx_bf16" in features or ("avx512_bf16" in features and find_vendor() == "AMD")


@functools.cache
def read_cpu_features() -> frozenset[str]:
    """Return the processor's vendor and instruction sets, among others; nothing without /proc."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def count_cores() -> int:
    """Return the number of cores that this process, or its container, may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    number = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # There is no limit.
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        number = min(number, max(-(-quota // period), 1))
    return number
