"""Choose how layers run over time, and the dtype of their matmuls, on this machine.

`python -m lstm_jax.ops` prints what is chosen here.
"""

from typing import NamedTuple

import jax

from lstm_jax.ops import native, processor
from lstm_jax.ops.gates import Gating
from lstm_jax.ops.in_c import LANES


class Row(NamedTuple):
    """Layers that the library in C runs on a kind of CPU, and the measurement behind it."""

    processors: str  # Of "AMD" (any but Intel's), "Intel" without AMX, and "AMX".
    # "windows" of training and evaluation, "steps" of generation, or "losses" of large
    # vocabularies, with any number of hidden units.
    work: str
    dtype: str  # Of matmuls.
    measured: str
    largest: float = float("inf")  # Number of hidden units for which it is used.
    gatings: str = "lstm"  # Names of gated recurrences.


# XLA runs all other layers, and those whose hidden size is not a multiple of 16. Measured on two
# cores, of Zen 4 or of Emerald Rapids without AMX, at 1 x 1,024, 2 x 512 and 2 x 256 or as stated
# (docs/speed.md); with AMX, which float32 does not use, of Sapphire Rapids. Rows in float32 and
# int8 hold for older processors of Intel, too, of which none was measured. With 24 texts or more,
# XLA is faster than Intel's steps in bfloat16, but kernels are packed before that is known.
# Windows of peephole LSTMs, GRUs and RNNs: at 256, 512 and 1,024 hidden units, 32 x 128, forward
# and backward (docs/layers.md).
TABLE = (
    Row("AMD", "windows", "bfloat16", "0.77, 0.57, 0.84 of XLA's time at three sizes"),
    Row("AMD", "windows", "float32", "0.91, 0.82, 0.79 of XLA's time", largest=1024),
    Row("AMD", "steps", "bfloat16", "0.37 of XLA's time for a text, 0.50 for 64"),
    Row("AMD", "steps", "float32", "0.89 of XLA's time for a text, 0.86 for 64", 1024),
    Row("AMD", "steps", "int8", "0.64 of the time in bfloat16 for a text, 0.57 for 64"),
    Row("AMD", "windows", "bfloat16", "0.63 to 0.78 of XLA's time", gatings="peephole_lstm"),
    Row("AMD", "windows", "bfloat16", "0.79, 0.88 of XLA's time at 256, 512", gatings="gru"),
    Row("AMD", "windows", "float32", "0.87, 0.99 of XLA's time at 256, 512", 512, "gru"),
    Row("AMD", "windows", "bfloat16", "0.57 to 0.61 of XLA's time", gatings="rnn"),
    Row("AMD", "windows", "float32", "0.75 to 0.96 of XLA's time", 1024, "peephole_lstm rnn"),
    Row("AMD", "steps", "bfloat16", "0.3 to 0.9 of XLA's time", gatings="peephole_lstm gru rnn"),
    Row("AMD", "steps", "float32", "0.70 to 0.93 of XLA's time", 512, "peephole_lstm rnn"),
    Row("Intel", "windows", "bfloat16", "0.89 of XLA's time at 256, 1.01 at 512", largest=256),
    Row("AMX", "windows", "bfloat16", "a sketch: 0.84, 0.52, 0.48 of XLA's time"),
    Row("Intel AMX", "windows", "float32", "0.94, 0.80, 0.76 of XLA's time; 0.92 at 1,536", 1536),
    Row("Intel", "steps", "bfloat16", "0.54 of XLA's time for a text, 1.32 for 64"),
    Row("AMX", "steps", "bfloat16", "a sketch: 0.51 to 0.66 of XLA's time, 0.50 for 64"),
    Row("Intel AMX", "steps", "float32", "0.94 of XLA's time for a text, 0.93 for 64", 1024),
    Row("Intel", "steps", "int8", "0.45 of the time in bfloat16 for a text, 0.36 for 64"),
    Row("AMX", "steps", "int8", "0.21 to 0.25 of XLA's time for a text, 0.51 for 64"),
    Row("AMD", "losses", "bfloat16", "0.53 of XLA's processor time for 10,000 tokens"),
    Row("AMX", "losses", "bfloat16", "not measured"),
)
_INSTRUCTIONS = {"float32": "avx512f", "bfloat16": "avx512_bf16", "int8": "avx512_vnni"}


def list_rows() -> list[Row]:
    """Return the rows of `TABLE` for this CPU; none without the library, or on another device."""
    library = native.load_library() if jax.default_backend() == "cpu" else None
    kind = "AMX" if library and library.uses_amx else processor.find_vendor()
    rows = [row for row in TABLE if library and kind in row.processors.split()]
    return [row for row in rows if _INSTRUCTIONS[row.dtype] in processor.read_cpu_features()]


def find_row(work: str, dtype: str, hidden_size: int, gating: str = "lstm") -> Row | None:
    """Return the row of `TABLE` for such layers here; without one, XLA runs them."""
    has_instructions = _INSTRUCTIONS[dtype] in processor.read_cpu_features()
    for row in TABLE if hidden_size % LANES == 0 and has_instructions else ():
        is_of_size = (row.work, row.dtype) == (work, dtype) and hidden_size <= row.largest
        is_alike = is_of_size and gating in row.gatings.split()
        if is_alike and row in list_rows():  # Last, because it may compile the library.
            return row
    return None


def runs_in_c(
    work: str, dtype: str, hidden_size: int = 0, batch_size: int | None = None, gating: str = "lstm"
) -> bool:
    """Return whether the library runs such layers here.

    In windows, it divides texts between threads: in float32, XLA is faster for fewer texts than
    threads.
    """
    is_shared = batch_size is None or dtype != "float32" or batch_size >= native.count_threads()
    return is_shared and find_row(work, dtype, hidden_size, gating) is not None


def choose(
    name: str,
    gating: Gating,
    *,
    size: int,
    batch: int | None = None,
    dtype: str = "float32",
    is_wide: bool = False,
    has_reset: bool = False,
    has_lengths: bool = False,
) -> str:
    """Return the implementation that runs such a layer of `size` hidden units, never "auto".

    "auto" is the fastest in measurements (docs/layers.md). `is_wide`: arrays have more than 32
    bits; `dtype` is that of matmuls.

    Raises:
      ValueError: if the named implementation can't run the layer here.
    """
    backend = jax.default_backend()
    if name == "auto":
        in_c = not is_wide and runs_in_c("windows", dtype, size, batch, gating.name)
        return "c" if in_c else "xla"
    limit = None
    if name not in ("scan", "xla", "c", "cudnn", "pallas"):
        limit = "does not exist: choose scan, xla, c, cudnn or pallas"
    elif (name == "cudnn" and backend != "gpu") or (name == "pallas" and backend != "tpu"):
        limit = f"needs a {'GPU' if name == 'cudnn' else 'TPU'}"
    elif name in ("c", "cudnn", "pallas") and is_wide:
        limit = "does not support float64"
    elif name in ("cudnn", "pallas") and has_reset:
        limit = "has no resets, where a document or an episode begins"
    elif name == "pallas" and has_lengths:
        limit = "has no lengths"
    elif name == "cudnn" and (gating.name != "lstm" or dtype != "float32"):
        limit = "runs only an LSTM in float32"
    elif name == "c" and (size % LANES or not _is_available(dtype)):
        limit = f"needs a CPU with AVX-512 and a multiple of {LANES} hidden units; here are {size}"
    if limit:
        raise ValueError(f"the implementation {name!r} {limit}; 'auto' supports any layer")
    return name


def _is_available(dtype: str) -> bool:
    library = native.load_library() if jax.default_backend() == "cpu" else None
    return library is not None and _INSTRUCTIONS[dtype] in processor.read_cpu_features()


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
