"""Print what runs gated layers on this machine, and why: `python -m lstm_jax.ops`."""

import platform

import jax
import jaxlib

from lstm_jax.ops import choice, native
from lstm_jax.ops.processor import count_cores, read_cpu_features
from lstm_jax.version import __version__

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def main() -> None:
    """Print the versions, the processor, and a line for each kind of work."""
    features = [name for name in _FEATURES if name in read_cpu_features()]
    library = native.load_library()
    described = "none"
    if library:
        described = f"{library.name}, {library.lanes} lanes{', AMX' if library.uses_amx else ''}"
    print(
        f"lstm-jax {__version__}, JAX {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}\n"
        f"device: {jax.default_backend()}; {count_cores()} cores; "
        f"instructions: {', '.join(features) or 'unknown'}\n"
        f"library in C: {described}\n"
        f"model.dtype=auto is {choice.choose_dtype(True)} for gated layers\n"
    )
    for row in choice.list_rows():
        sizes = "" if row.largest == float("inf") else f", up to {row.largest:,} hidden units"
        work, gatings = row.work.replace(" ", " and "), row.gatings.replace(" ", ", ")
        of = "large vocabularies" if row.work == "losses" else gatings
        print(f"the library runs {work} of {of} in {row.dtype}{sizes}")
    print("XLA runs everything else")


if __name__ == "__main__":
    main()
