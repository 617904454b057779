"""Choose how layers run over time, and the dtype of their matmuls, on this machine."""

from typing import NamedTuple

import jax

from lstm_jax.ops import native, processor
from lstm_jax.ops.gates import Gating


class Row(NamedTuple):
    """Layers that the library in C runs faster than XLA on a kind of CPU."""

    # With AVX-512, "AMX", other "Intel", and "AMD"; without, "AVX2" and "NEON".
    processors: str
    # "windows" of training and evaluation, "steps" of generation, or "losses" of large
    # vocabularies, with any number of hidden units.
    work: str
    dtype: str  # Of matmuls.
    gatings: str  # Names of gated recurrences.
    largest: float = float("inf")  # Number of hidden units for which it is faster.


# XLA runs all other layers. Measured at 256 to 1,024 hidden units on two cores of AMD's Zen 4 and
# Intel's Emerald Rapids, with and without AMX, and at up to 2,048 on Zen 5 (docs/speed.md). AVX2
# was measured beside PyTorch only, NEON not at all: they have the rows of AMD.
TABLE = (
    Row("AMD NEON", "windows steps", "bfloat16", "lstm peephole_lstm gru rnn"),
    Row("AMD AVX2 NEON", "windows steps", "float32", "lstm peephole_lstm rnn", 1280),
    Row("AMD AVX2 NEON", "windows", "float32", "gru", 512),
    Row("AMX", "windows", "bfloat16", "lstm peephole_lstm gru rnn"),
    Row("AMX", "windows", "float32", "lstm peephole_lstm gru rnn", 1024),
    Row("AMX", "steps", "bfloat16", "lstm"),
    Row("AMX", "steps", "float32", "lstm", 1024),
    Row("Intel", "windows", "bfloat16", "lstm", 256),
    Row("Intel", "steps", "bfloat16", "lstm"),
    Row("Intel", "windows steps", "float32", "lstm", 1024),
    Row("AMD AMX", "losses", "bfloat16", "lstm"),
    Row("AMX", "losses", "float32", "lstm"),
)


def name_processor(library: native.Library) -> str:
    """Return the name that rows of `TABLE` have for the processor which runs a library."""
    if library.lanes < 16:
        return {8: "AVX2", 4: "NEON"}[library.lanes]
    return "AMX" if library.uses_amx else processor.find_vendor()


def runs_in_c(work: str, dtype: str, hidden_size: int = 0, gating: str = "lstm") -> bool:
    """Return whether the library runs such layers here, by `TABLE`."""
    library = native.load_library() if is_available(dtype) else None
    name = library and name_processor(library)
    return any(
        name in row.processors.split()
        and work in row.work.split()
        and dtype == row.dtype
        and gating in row.gatings.split()
        and hidden_size <= row.largest
        for row in TABLE
    )


def choose(name: str, gating: Gating, *, size: int, dtype: str = "float32") -> str:
    """Return the implementation that runs such a layer of `size` hidden units, never "auto".

    "auto" is what `TABLE` says. `dtype` is that of matmuls, or "float64" if arrays have it.

    Raises:
      ValueError: if the named implementation can't run the layer here.
    """
    if name == "auto":
        return "c" if runs_in_c("windows", dtype, size, gating.name) else "xla"
    if name not in ("scan", "xla", "c"):
        raise ValueError(f"implementation is {name!r}: choose auto, scan, xla or c")
    if name == "c" and not is_available(dtype):
        raise ValueError(f"implementation 'c' can't multiply in {dtype} here: choose auto")
    return name


def is_available(dtype: str) -> bool:
    """Return whether the library multiplies in this dtype here."""
    is_cpu = jax.default_backend() == "cpu"
    return is_cpu and dtype in native.list_dtypes() and native.load_library() is not None


def choose_dtype(is_gated: bool) -> str:
    """Return "bfloat16" where matmuls in bfloat16 are faster, otherwise "float32".

    They are on TPUs and on GPUs since NVIDIA's compute capability 8, and in gated layers on
    processors with fast instructions for them.
    """
    if jax.default_backend() == "cpu":
        is_fast = is_gated and processor.is_faster_in_bfloat16()
    else:
        capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
        is_fast = not capability.startswith(("5.", "6.", "7."))
    return "bfloat16" if is_fast else "float32"
