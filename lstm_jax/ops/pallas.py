"""Run the loops of a gated recurrence on a TPU, each in a Pallas kernel with all weights in VMEM.

XLA reads the recurrent kernel from memory at every step of a loop. Here each loop is one call,
whose grid is the time; the recurrent kernel and the state stay in VMEM, and what a step reads and
writes is copied while others are computed. `accelerator` does the rest of a layer. There are no
marks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from lstm_jax.ops.accelerator import Loops, save_step
from lstm_jax.ops.gates import Gating
from lstm_jax.ops.scan import Layer, add_hidden, add_sums, get_peepholes

# Mosaic's tiles have 16 rows, in bfloat16, and 128 columns.
_ROWS, _COLUMNS = 16, 128
_VMEM_BYTES = 100 * 2**20  # Of the 128 MiB of a TPU v5e or v6e.
_INTERPRETER: Any = True  # Of tests, which run it on a CPU.


def _forward(layer: Layer, differentiable: bool) -> tuple[Any, Array]:
    gating, params, added, carry, _, _ = layer
    time, batch, _ = added.shape
    kernel, hidden = params.recurrent_kernel, len(params.recurrent_kernel)
    rows, columns = pl.align_to(batch, _ROWS), pl.align_to(hidden, _COLUMNS)
    # After the bias come recurrent biases or peepholes, [n, hidden].
    vectors = [_pad(jnp.atleast_2d(x), x.size // hidden, columns) for x in params[3:]]
    padded = (
        _pad(added, rows, columns, len(gating.read_inputs)),
        _pad(kernel, columns, columns, len(gating.read_hidden)),
    )
    parts = 1 + gating.has_peepholes + (gating.num_factors if differentiable else 0)
    state = (rows, columns), added.dtype
    saved, *last = _call(
        functools.partial(_forward_kernel, gating, len(vectors), differentiable),
        lambda t: (t, 0, 0),
        [*padded, *vectors, *(_pad(x, rows, columns) for x in carry)],
        [((time, rows, parts * columns), added.dtype), *[state] * len(carry)],
        [*[added.dtype] * (len(carry) - 1), kernel.dtype],
    )
    last = gating.carry(*(x[:batch, :hidden] for x in last))
    return last, _unpad(saved, batch, hidden, columns)


def _forward_kernel(
    gating: Gating, num_vectors: int, differentiable: bool, *references: Any
) -> None:
    """Compute a step from references to arrays, of which the last are the state."""
    added, kernel, *others = references
    vectors, others = others[:num_vectors], others[num_vectors:]
    size = len(gating.carry._fields)
    first, saved, last = others[:size], others[size], others[size + 1 : -size]
    state = others[-size:]

    @pl.when(pl.program_id(0) == 0)
    def start() -> None:
        for x, y in zip(state, first, strict=True):
            x[...] = y[...].astype(x.dtype)

    params = gating.params(None, None, None, *(x[...] for x in vectors))
    before = gating.carry(*(x[...] for x in state))
    sums = add_sums(gating, params, added[0], _multiply(before.hidden, kernel[...]))
    before = before._replace(hidden=before.hidden.astype(saved.dtype))
    peepholes = get_peepholes(params, axis=0)
    gates, after = gating.activate(sums, before, peepholes)
    factors = gating.derive(gates, before, after, peepholes) if differentiable else ()
    saved[0] = save_step(gating, factors, after)
    for x, y, value in zip(state, last, after, strict=True):
        x[...] = value.astype(x.dtype)
        y[...] = value


def _backward(layer: Layer, saved: Array, d_last: Any, d_outputs: Array) -> tuple[Array, Any]:
    gating, kernel = layer.gating, layer.params.recurrent_kernel
    time, batch, hidden = d_outputs.shape
    rows, columns = pl.align_to(batch, _ROWS), pl.align_to(hidden, _COLUMNS)
    state = (rows, columns), saved.dtype
    read = [_pad(saved, rows, columns, saved.shape[2] // hidden), _pad(d_outputs, rows, columns)]
    d_sums, *d_first = _call(
        functools.partial(_backward_kernel, gating),
        lambda t: (time - 1 - t, 0, 0),
        [
            *read,
            _pad(kernel, columns, columns, len(gating.read_hidden)).T,
            *(_pad(cotangent, rows, columns) for cotangent in d_last),
        ],
        [((time, rows, gating.num_sums * columns), kernel.dtype), *[state] * len(d_last)],
        [saved.dtype] * len(d_last),
    )
    d_first = gating.carry(*(cotangent[:batch, :hidden] for cotangent in d_first))
    return _unpad(d_sums, batch, hidden, columns), d_first


def _backward_kernel(gating: Gating, *references: Any) -> None:
    """Compute a backward step; the kernel is transposed, and the last references are the state."""
    saved, d_outputs, kernel, *others = references
    size = len(gating.carry._fields)
    d_last, d_sums, d_first = others[:size], others[size], others[size + 1 : -size]
    state = others[-size:]

    @pl.when(pl.program_id(0) == 0)
    def start() -> None:
        for x, y in zip(state, d_last, strict=True):
            x[...] = y[...]

    d_after = gating.carry(*(x[...] for x in state))
    d_after = d_after._replace(hidden=d_after.hidden + d_outputs[0])
    columns = d_after.hidden.shape[1]
    factors = jnp.split(saved[0], saved.shape[2] // columns, axis=1)[: gating.num_factors]
    gradients, d_before = gating.pull_back(tuple(factors), d_after)
    rounded = [gradient.astype(d_sums.dtype) for gradient in gradients]
    d_sums[0] = jnp.concatenate(rounded, axis=1)
    read = jnp.concatenate([rounded[i] for i in gating.read_hidden], axis=1)
    d_before = add_hidden(d_before, _multiply(read, kernel[...]))
    for x, y, value in zip(state, d_first, d_before, strict=True):
        x[...] = y[...] = value


def _multiply(a: Array, b: Array) -> Array:
    # Mosaic allows no other precision in bfloat16, and JAX's default may be another.
    precision = jax.lax.Precision.DEFAULT if b.dtype == jnp.bfloat16 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _call(
    function: Callable[..., None],
    index: Callable[[Any], tuple[Any, ...]],
    arguments: list[Array],
    results: list[tuple[tuple[int, ...], Any]],
    scratch: list[Any],
) -> list[Array]:
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


def _pad(x: Array, rows: int, columns: int, parts: int = 1) -> Array:
    """Fill x [..., batch, parts * hidden] with zeros to [..., rows, parts * columns]."""
    x = x.reshape(*x.shape[:-1], parts, -1)
    widths = [(0, 0)] * x.ndim
    widths[-3], widths[-1] = (0, rows - x.shape[-3]), (0, columns - x.shape[-1])
    return jnp.pad(x, widths).reshape(*x.shape[:-3], rows, parts * columns)


def _unpad(x: Array, batch: int, hidden: int, columns: int) -> Array:
    """Undo `_pad`."""
    parts = x.reshape(*x.shape[:-1], -1, columns)[..., :batch, :, :hidden]
    return parts.reshape(*parts.shape[:-2], -1)


LOOPS = Loops(_forward, _backward)
