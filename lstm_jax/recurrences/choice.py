"""Choose how layers run over time, and the dtype of their matmuls, on this machine."""

import jax

from lstm_jax.recurrences.processor import has_bfloat16_instructions


def choose_recurrence(
    recurrence: str, cell: str, dtype: str, is_lstm: bool, has_parallel: bool
) -> str:
    """Return `recurrence`, a field of `LanguageModel`, with "auto" resolved.

    "auto" is "fused" for an LSTM, "parallel" for a cell with a parallel form, otherwise "scan":
    the fastest in measurements (`benchmarks/recurrences.py`).

    Raises:
      ValueError: if `recurrence` can't run this model on this machine.
    """
    if recurrence == "auto":
        return "fused" if is_lstm else "parallel" if has_parallel else "scan"
    limit = None
    if recurrence in ("fused", "cudnn") and not is_lstm:
        limit = "supports only LSTM cells without layer normalization or a block"
    elif recurrence == "parallel" and not has_parallel:
        limit = f"needs a cell with a method run_parallel, which {cell} lacks"
    elif recurrence == "cudnn" and jax.default_backend() != "gpu":
        limit = "needs a GPU"
    elif recurrence == "cudnn" and dtype != "float32":
        limit = "supports only float32"
    if limit:
        raise ValueError(f"the recurrence {recurrence!r} {limit}; 'auto' supports any model")
    return recurrence


def choose_dtype(recurrence: str) -> str:
    """Return "bfloat16" where matmuls in bfloat16 are faster, otherwise "float32".

    They are on GPUs and TPUs, except in cuDNN, and in fused layers on processors that have
    instructions for them.
    """
    fast_on_cpu = recurrence == "fused" and has_bfloat16_instructions()
    is_fast = fast_on_cpu or jax.default_backend() != "cpu"
    return "bfloat16" if is_fast and recurrence != "cudnn" else "float32"
