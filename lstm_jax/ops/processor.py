"""Query the processor: its vendor and instruction sets, and the cores that this process may use."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
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
    """Return the processor's vendor and instruction sets, by Linux's names; nothing if unknown.

    With LSTM_JAX_CPU=avx2 in the environment, it is as on a processor without AVX-512 and AMX.
    """
    features = set[str]()
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            sysctl = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True)
            features = {"asimd"} if platform.machine() == "arm64" else set()
            features |= {"bf16"} if "FEAT_BF16: 1" in sysctl.stdout else set()
        else:
            features = set(Path("/proc/cpuinfo").read_text().split())
    if os.environ.get("LSTM_JAX_CPU") == "avx2":
        features = {name for name in features if not name.startswith(("avx512", "amx"))}
    return frozenset(features)


def count_cores() -> int:
    """Return the number of cores that this process, or its container, may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    number = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # There is no limit.
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        number = min(number, max(-(-quota // period), 1))
    return number
