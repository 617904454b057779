"""Run the loops of an LSTM layer on a TPU, each in a Pallas kernel with all weights in VMEM.

XLA reads the recurrent kernel from memory at every step of a loop. Here each loop is one call,
whose grid is the time; the recurrent kernel and the state stay in VMEM, and what a step reads and
writes is copied while others are computed. `accelerator` does the rest of a layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lstm_jax.cells.lstm import LSTMCarry
from lstm_jax.ops.accelerator import Loops, Steps, compute_step, differentiate_step

# Mosaic's tiles have 16 rows, in bfloat16, and 128 columns.
_ROWS, _COLUMNS = 16, 128
_VMEM_BYTES = 100 * 2**20  # Of the 128 MiB of a TPU v5e or v6e.
_INTERPRETER: Any = True  # Of tests, which run it on a CPU.


def _forward(
    kernel: jax.Array, steps: Steps, carry: LSTMCarry, differentiable: bool
) -> tuple[jax.Array, jax.Array]:
    added, _ = steps  # Without starts.
    time, batch, _ = added.shape
    hidden = len(kernel)
    rows, columns = pl.align_to(batch, _ROWS), pl.align_to(hidden, _COLUMNS)
    parts = 7 if differentiable else 1
    states = [_pad(state, rows, columns) for state in carry]
    kept, cell = _call(
        functools.partial(_forward_kernel, differentiable),
        lambda t: (t, 0, 0),
        [_pad(added, rows, columns, 4), _pad(kernel, columns, columns, 4), *states],
        [((time, rows, parts * columns), added.dtype), ((rows, columns), added.dtype)],
        [added.dtype, kernel.dtype],
    )
    return _unpad(kept, batch, hidden, columns), cell[:batch, :hidden]


def _forward_kernel(differentiable: bool, *references: Any) -> None:
    """Compute a step from references to arrays, of which the last two are the state."""
    added, kernel, first_cell, first_hidden, kept, last_cell, cell, hidden = references

    @pl.when(pl.program_id(0) == 0)
    def start() -> None:
        cell[...] = first_cell[...]
        hidden[...] = first_hidden[...].astype(hidden.dtype)

    sums = _multiply(hidden[...], kernel[...]) + added[0]
    after, outputs, kept[0] = compute_step(sums, cell[...], differentiable)
    cell[...] = last_cell[...] = after
    hidden[...] = outputs.astype(hidden.dtype)


def _backward(
    kernel: jax.Array, steps: Steps, d_outputs: jax.Array, d_last: LSTMCarry
) -> tuple[jax.Array, LSTMCarry]:
    kept, _ = steps
    time, batch, hidden = d_outputs.shape
    rows, columns = pl.align_to(batch, _ROWS), pl.align_to(hidden, _COLUMNS)
    state = (rows, columns), kept.dtype
    read = [_pad(kept, rows, columns, 7), _pad(d_outputs, rows, columns)]
    states = [_pad(cotangent, rows, columns) for cotangent in d_last]
    d_sums, *d_first = _call(
        _backward_kernel,
        lambda t: (time - 1 - t, 0, 0),
        [*read, _pad(kernel, columns, columns, 4).T, *states],
        [((time, rows, 4 * columns), kernel.dtype), state, state],
        [kept.dtype, kept.dtype],
    )
    d_cell, d_hidden = (cotangent[:batch, :hidden] for cotangent in d_first)
    return _unpad(d_sums, batch, hidden, columns), LSTMCarry(d_cell, d_hidden)


def _backward_kernel(*references: Any) -> None:
    """Compute a backward step; the kernel is transposed, and the last two are the state."""
    kept, d_outputs, kernel, d_last_cell, d_last_hidden, *written = references
    d_sums, d_first_cell, d_first_hidden, d_cell, d_hidden = written

    @pl.when(pl.program_id(0) == 0)
    def start() -> None:
        d_cell[...] = d_last_cell[...]
        d_hidden[...] = d_last_hidden[...]

    gradients, before = differentiate_step(kept[0], d_cell[...], d_hidden[...] + d_outputs[0])
    rounded = jnp.concatenate(gradients, axis=1).astype(d_sums.dtype)
    d_sums[0] = rounded
    d_cell[...] = d_first_cell[...] = before
    d_hidden[...] = d_first_hidden[...] = _multiply(rounded, kernel[...])


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    # Mosaic allows no other precision in bfloat16, and JAX's default may be another.
    precision = jax.lax.Precision.DEFAULT if b.dtype == jnp.bfloat16 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _call(
    function: Callable[..., None],
    index: Callable[[Any], tuple[Any, ...]],
    arguments: list[jax.Array],
    results: list[tuple[tuple[int, ...], Any]],
    scratch: list[Any],
) -> list[jax.Array]:
    """Call a kernel for each step, on blocks of arrays [time, ...] and on whole matrices in VMEM.

    The scratch memory has these dtypes, and the shape of the last result.
    """
    arrays = [jax.ShapeDtypeStruct(*result) for result in results]

    def specify(array: Any) -> pl.BlockSpec:
        whole = pl.BlockSpec(memory_space=pltpu.VMEM)
        return whole if array.ndim == 2 else pl.BlockSpec((1, *array.shape[1:]), index)

    return pl.pallas_call(
        function,
        arrays,
        grid=(len(arguments[0]),),
        in_specs=list(map(specify, arguments)),
        out_specs=list(map(specify, arrays)),
        scratch_shapes=[pltpu.VMEM(arrays[-1].shape, dtype) for dtype in scratch],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        interpret=_INTERPRETER if jax.default_backend() != "tpu" else False,
    )(*arguments)


def _pad(x: jax.Array, rows: int, columns: int, parts: int = 1) -> jax.Array:
    """Fill x [..., batch, parts * hidden] with zeros to [..., rows, parts * columns]."""
    x = x.reshape(*x.shape[:-1], parts, -1)
    widths = [(0, 0)] * x.ndim
    widths[-3], widths[-1] = (0, rows - x.shape[-3]), (0, columns - x.shape[-1])
    return jnp.pad(x, widths).reshape(*x.shape[:-3], rows, parts * columns)


def _unpad(x: jax.Array, batch: int, hidden: int, columns: int) -> jax.Array:
    """Undo `_pad`."""
    parts = x.reshape(*x.shape[:-1], -1, columns)[..., :batch, :, :hidden]
    return parts.reshape(*parts.shape[:-2], -1)


LOOPS = Loops(_forward, _backward)
