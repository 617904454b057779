"""Run one layer of a gated recurrence with the library in C: over time, or for a single step.

`forward`, `backward` and `differentiate_params` together are the recurrence and its derivatives.
Arrays are float32, operands of matmuls are rounded to `dtype`, and the hidden size is a multiple
of the library's lanes, for which `pad_units` adds hidden units. Marks, uint8 [time, batch], are
`RESET` where a step reads zeros instead of the carry, `FROZEN` where it leaves the carry as it is
(its output then is the hidden state), and otherwise 0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lstm_jax.matmul import matmul_rounded
from lstm_jax.ops import native
from lstm_jax.ops.gates import Gating, Layer, Marks, align, make_gradients

_VECTORS, _BLOCK, _DEPTH = 4, 96, 256  # As in lstm.c.
RESET, FROZEN = 1, 2
_KINDS = ("lstm", "peephole_lstm", "gru", "rnn")
_NUMBERS_IN_WORD = {"float32": 1, "bfloat16": 2}  # Of 32 bits.


def count_lanes() -> int:
    """Return the number of lanes of the library's vectors, of which a tile has `_VECTORS`."""
    library = native.load_library()
    assert library
    return library.lanes


# Gates, cell states, what the kernel multiplies, rounded, and outputs, [time, batch, n] each.
Saved = tuple[Array, Array, Array, Array]


def forward(
    layer: Layer, differentiable: bool = True
) -> tuple[tuple[Any, Float[Array, "time batch hidden"]], Saved]:
    """Return the last carry and the outputs, and what the derivatives need.

    Among it are `rows` [time, batch, depth], what the kernel multiplies, rounded: the hidden state,
    the inputs, and 1 for the bias. `differentiable` has no effect: the library always stores them.
    """
    gating, params, inputs, carry, marks, dtype = layer
    time, batch, _ = inputs.shape
    hidden = len(params.recurrent_kernel)
    input_kernel, recurrent_kernel = gating.spread_kernels(params)
    parts = recurrent_kernel, input_kernel, gating.join_biases(params)[None]
    packed = pack_gates(gating, jnp.concatenate([part.astype(dtype) for part in parts]))
    saved_gates, cells, outputs, rows = _call(
        "forward",
        (
            inputs,
            packed,
            _get_cell(carry),
            carry.hidden,
            _get_peepholes(params),
            _get_marks(marks, batch),
        ),
        ((time, batch, 0 if gating.num_sums == 1 else gating.num_sums * hidden), "float32"),
        ((time, batch, hidden * gating.has_cell), "float32"),
        ((time, batch, hidden), "float32"),
        ((time, batch, packed.shape[1] * _NUMBERS_IN_WORD[dtype]), dtype),
        kind=_KINDS.index(gating.name),
        features=len(input_kernel),
    )
    last = _replace(carry, cells[-1], outputs[-1])
    return (last, outputs), (saved_gates, cells, rows, outputs)


def backward(
    layer: Layer, saved: Saved, d_last: Any, d_outputs: Float[Array, "time batch hidden"]
) -> tuple[Float[Array, "time batch sums"], Any]:
    """Return the cotangents of the sums, [time, batch, num_sums * hidden], and of the first carry.

    `d_last` and `d_outputs` are those of the last carry and of the outputs.
    """
    gating, params, _, carry, marks, dtype = layer
    saved_gates, cells, _, outputs = saved
    time, batch, hidden = outputs.shape
    width = gating.num_sums * hidden
    # The transposed kernel in tiles: [tiles, words, columns of a tile, in a word].
    numbers, tile = _NUMBERS_IN_WORD[dtype], _VECTORS * count_lanes()
    kernel = gating.spread_kernels(params)[1].astype(dtype)
    rows_of_tiles = jnp.pad(kernel, ((0, -hidden % tile), (0, 0)))
    packed = rows_of_tiles.reshape(-1, tile, width // numbers, numbers).transpose(0, 2, 1, 3)
    d_cell = _get_cell(d_last)
    aliases = {7: 1, 8: 2}  # The cotangents of the last carry become those of the first,
    if (saved_gates.shape, dtype) == ((time, batch, width), "float32"):
        aliases[0] = 0  # and the gates those of the sums.
    d_sums, d_cell, d_hidden = _call(
        "backward",
        (
            saved_gates,
            packed,
            _get_cell(carry),
            carry.hidden,
            cells,
            outputs,
            d_outputs,
            d_cell,
            d_last.hidden,
            _get_peepholes(params),
            _get_marks(marks, batch),
        ),
        ((time, batch, width), dtype),
        (d_cell.shape, "float32"),
        (d_last.hidden.shape, "float32"),
        aliases=aliases,
        kind=_KINDS.index(gating.name),
    )
    return d_sums, _replace(carry, d_cell, d_hidden)


def differentiate_params(
    layer: Layer, saved: Saved, d_sums: Float[Array, "time batch sums"]
) -> tuple[Any, Float[Array, "time batch features"]]:
    """Return the cotangents of the parameters and of the inputs, from those of the sums."""
    gating, params, inputs = layer.gating, layer.params, layer.inputs
    _, cells, rows, outputs = saved
    time, batch, hidden = outputs.shape
    bias = hidden + inputs.shape[2]
    flat, read = (x.reshape(time * batch, x.shape[2]) for x in (d_sums, rows))
    d_kernel = _matmul(read, flat, transpose_a=True)
    d_input_kernel, _ = gating.split_columns(d_kernel[hidden:bias])
    _, d_recurrent_kernel = gating.split_columns(d_kernel[:hidden])
    d_kernels = d_input_kernel, d_recurrent_kernel
    d_params = make_gradients(layer, d_kernels, d_kernel[bias], d_sums, cells)
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    by_inputs, _ = gating.split_columns(flat)
    kernel = params.input_kernel.astype(layer.dtype)
    d_inputs = _matmul(by_inputs, kernel, transpose_b=True).reshape(inputs.shape)
    return d_params, d_inputs


def pad_units(x: Array, hidden: int, value: float = 0) -> Array:
    """Return [..., n * hidden] with a value for more hidden units, up to whole vectors."""
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // hidden, hidden)
    padding = *[(0, 0)] * x.ndim, (0, -hidden % count_lanes())
    parts = jnp.pad(parts, padding, constant_values=value)
    return parts.reshape(*x.shape[:-1], parts.shape[-2] * parts.shape[-1])


# The library gets empty arrays in place of those that a layer doesn't have.


def _get_cell(carry: Any) -> Array:
    cell: Array = getattr(carry, "cell", carry.hidden[:, :0])
    return cell


def _get_peepholes(params: Any) -> Array:
    zeros = jnp.zeros((0, len(params.recurrent_kernel)), jnp.float32)
    peepholes: Array = getattr(params, "peepholes", zeros)
    return peepholes


def _get_marks(marks: Marks, batch: int) -> Array:
    """Return `RESET`, `FROZEN` or 0 for each step, uint8 [time, batch]."""
    pairs = (marks.reset, RESET), (marks.frozen, FROZEN)
    codes = [mask.astype("uint8") * code for mask, code in pairs if mask is not None]
    return sum(codes[1:], codes[0]) if codes else jnp.zeros((0, batch), "uint8")


def _replace(carry: Any, cell: Array, hidden: Array) -> Any:
    """Return a carry like this one, with another state."""
    cells = {"cell": cell} if hasattr(carry, "cell") else {}
    return carry._replace(hidden=hidden, **cells)


def pack_gates(gating: Gating, kernel: Array) -> Array:
    """Arrange a kernel [depth, num_sums * hidden] in tiles: [tiles, words, 4, lanes, in a word].

    The 4 vectors of a tile are the sums of a vector of hidden units, or the only sum of 4 vectors.
    Zeros fill the last word.
    """
    num_sums, lanes = gating.num_sums, count_lanes()
    vectors = _VECTORS // num_sums  # Of hidden units.

    def arrange(rows: Array) -> Array:
        """Return rows [words, num_sums * hidden] as [tiles, words, 4, lanes]."""
        parts = rows.reshape(len(rows), num_sums, -1)
        parts = jnp.pad(parts, (*[(0, 0)] * 2, (0, -parts.shape[2] % (vectors * lanes))))
        parts = parts.reshape(*parts.shape[:2], -1, vectors, lanes)
        parts = parts.transpose(2, 0, 3, 1, 4)
        return parts.reshape(*parts.shape[:2], _VECTORS, lanes)

    if kernel.dtype == jnp.float32:
        return arrange(kernel)[..., None]
    pairs = jnp.pad(kernel, ((0, len(kernel) % 2), (0, 0)))
    return _interleave(arrange(pairs[::2]), arrange(pairs[1::2]))


@jax.custom_jvp
def _interleave(first: Array, second: Array) -> Array:
    """Stack two arrays in bfloat16 along a new last axis, in words: `jnp.stack` is slower."""
    bits = (jax.lax.bitcast_convert_type(x, "uint16") for x in (first, second))
    low, high = (x.astype("uint32") for x in bits)
    return jax.lax.bitcast_convert_type(low | high << 16, first.dtype)


@_interleave.defjvp
def _differentiate_interleave(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return _interleave(*primals), jnp.stack(tangents, axis=-1)


def run_step(
    gating: Gating,
    packed: Array,
    inputs: Sequence[Array],
    carry: Any,
    added: Array,
    peepholes: Array | None = None,
) -> Any:
    """Run one step of a layer and return the next carry.

    The kernel is from `pack_gates`, for any hidden size. `inputs` holds the inputs of the layer,
    unless `added` includes their matmul with the kernel already, and the hidden state, [batch, n]
    each. `added` [batch or 1, num_sums * hidden] is added to the sums.
    """
    rows = jnp.concatenate(inputs, axis=1).astype(packed.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % packed.shape[-1])))
    hidden, cell = carry.hidden.astype("float32"), _get_cell(carry).astype("float32")
    if peepholes is None:
        peepholes = jnp.zeros((0, hidden.shape[1]), jnp.float32)
    size = hidden.shape[1]
    arrays = (pad_units(x, size) for x in (added.astype("float32"), cell, hidden, peepholes))
    state = _run_step(gating, rows, packed, *arrays)
    return _replace(carry, *(x[:, :size].astype(carry.hidden.dtype) for x in state))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_step(gating: Gating, *arrays: Array) -> Sequence[Array]:
    _, _, _, cell, hidden, _ = arrays
    results = (cell.shape, "float32"), (hidden.shape, "float32")
    return _call("step", arrays, *results, kind=_KINDS.index(gating.name))


@_run_step.defjvp
def _differentiate_step(
    gating: Gating, primals: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Sequence[Array], Sequence[Array]]:
    """Differentiate the same step, computed by JAX."""

    def run(
        rows: Array, packed: Array, added: Array, cell: Array, hidden: Array, peepholes: Array
    ) -> Sequence[Array]:
        parts = packed.reshape(*packed.shape[:2], -1, gating.num_sums, *packed.shape[3:])
        parts = parts.transpose(1, 5, 3, 0, 2, 4).reshape(rows.shape[1], gating.num_sums, -1)
        kernel = parts[:, :, : hidden.shape[1]].reshape(rows.shape[1], -1)
        terms = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)  # It has a JVP.
        split = tuple(jnp.split(terms + added, gating.num_sums, axis=1))
        carry = gating.carry(cell, hidden) if gating.has_cell else gating.carry(hidden)
        after = gating.activate(split, carry, peepholes[:, None])[1]
        return [_get_cell(after), after.hidden]

    return jax.jvp(run, primals, tangents)


def _matmul(a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """Return what `matmul` does, by XLA in float32, where it is as fast."""
    if a.dtype == jnp.bfloat16:
        return matmul(a, b, transpose_a, transpose_b)
    return matmul_rounded(a.T if transpose_a else a, b.T if transpose_b else b)


def matmul(a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """Return a @ b in float32, for matrices of one dtype, each of which may be transposed first."""
    rows, depth = a.shape[::-1] if transpose_a else a.shape
    width, tile = len(b) if transpose_b else b.shape[1], _VECTORS * count_lanes()
    words, threads = -(-depth // _NUMBERS_IN_WORD[a.dtype.name]), native.count_threads()
    # The smaller factor is packed, and each thread packs a block of the other one at a time.
    packed, block = rows * words, words * tile
    if rows > width:
        packed, block = -(-width // tile) * tile * words, _BLOCK * _DEPTH
    results = ((rows, width), "float32"), ((packed,), "uint32"), ((threads, block), "uint32")
    return _call("matmul", (a, b), *results, transpose_a=transpose_a, transpose_b=transpose_b)[0]


def compute_cross_entropy(
    inputs: Array,
    kernel: Array,
    bias: Array,
    targets: Array,
    is_transposed: bool,
    differentiable: bool,
) -> tuple[Array, Array]:
    """Return the cross-entropies of inputs @ kernel + bias, float32 [n], in nats.

    The arguments are those of `cross_entropy.compute_cross_entropy`, with inputs and a kernel of
    one dtype. If `differentiable`, also return the derivatives of each cross-entropy by its logits,
    [n, vocabulary] in this dtype; otherwise this array is empty.
    """
    (rows, depth), dtype = inputs.shape, inputs.dtype.name
    width, threads, tile = len(bias), native.count_threads(), _VECTORS * count_lanes()
    tiles, words = -(-width // tile), -(-depth // _NUMBERS_IN_WORD[dtype])
    sums, shifted, d_logits, *_ = _call(
        "cross_entropy",
        (inputs, kernel, bias, targets.astype("int32")),
        ((rows,), "float32"),
        ((rows,), "float32"),
        ((rows, width) if differentiable else (0, 0), dtype),
        # Working memory; as integers, so that `jax_debug_nans` does not check it.
        ((tiles * tile * words,), "uint32"),
        ((threads, _BLOCK * _DEPTH), "uint32"),
        ((threads, _BLOCK, tiles * tile), "uint32"),
        is_transposed=is_transposed,
    )
    return jnp.log(sums) + shifted, d_logits


def _call(
    name: str,
    arguments: Sequence[Array],
    *results: tuple[tuple[int, ...], str],
    aliases: dict[int, int] | None = None,
    **attributes: int,
) -> Sequence[Array]:
    """Call a function of the library, which divides its work into a part for each thread.

    `aliases` maps an argument to the result that has its memory.
    """
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    library = native.load_library()
    assert library
    target = f"{library.name}-{name}"  # Compiled programs, including cached ones, call it by this.
    call = jax.ffi.ffi_call(target, shapes, vmap_method="sequential", input_output_aliases=aliases)
    others = {key: np.int64(value) for key, value in attributes.items()}
    found = call(*arguments, parts=np.int64(native.count_threads()), **others)
    aligned: Sequence[Array] = align([*arguments, *found])[len(arguments) :]
    return aligned
