"""Run one layer of a gated recurrence with the library in C: over time, or for a single step.

`forward`, `backward` and `differentiate_params` together are the recurrence and its derivatives.
Arrays are float32, operands of matmuls are rounded to `dtype`, and the hidden size is a multiple
of the library's lanes, for which `pad_units` adds hidden units. Marks, uint8 [time, batch], are
`RESET` where a step reads zeros instead of the carry, `FROZEN` where it leaves the carry as it is
(its output then is the hidden state), and otherwise 0. The library gets empty arrays in place of
those that a layer doesn't have.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lstm_jax.ops import native, vjp
from lstm_jax.ops.gates import GatedParams, Gating, Layer, LSTMCarry, Marks, Outputs, Sums, align

_VECTORS, _BLOCK, _DEPTH, _LARGEST_DEPTH = 4, 96, 256, 4096  # As in lstm.c.
RESET, FROZEN = 1, 2
_KINDS = ("lstm", "peephole_lstm", "gru", "rnn")
_NUMBERS_IN_WORD = {"float32": 1, "bfloat16": 2}  # Of 32 bits.
_LARGEST = 3e38  # Finite in bfloat16: infinity times a zero of a kernel would be NaN.

# Gates, cell states, what the kernel multiplies, rounded, and outputs, [time, batch, n] each.
Residuals = tuple[Array, Array, Array, Array]


def count_lanes() -> int:
    """Return the number of lanes of the library's vectors, of which a tile has `_VECTORS`."""
    library = native.load_library()
    assert library
    return library.lanes


def forward(layer: Layer, differentiable: bool = True) -> tuple[tuple[Any, Outputs], Residuals]:
    """Return the last carry and the outputs, and what the derivatives need.

    The derivatives need `rows` [time, batch, depth], by which the loop multiplies, in `dtype`: the
    hidden state, the inputs in bfloat16, and 1 for the bias. In float32, one matmul multiplies all
    inputs before: each step then reads a kernel of half the size. `differentiable` has no effect:
    the library always stores them.
    """
    gating, dtype, _, params, inputs, carry, marks = layer
    (time, batch, features), input_kernel = inputs.shape, params.input_kernel
    terms = jnp.zeros((time, batch, 0))
    if dtype == "float32":
        terms = matmul(inputs.reshape(time * batch, features), input_kernel)
        terms = terms.reshape(time, batch, input_kernel.shape[1])
        inputs, input_kernel = inputs[..., :0], input_kernel[:0]
    inputs = jnp.clip(inputs, -_LARGEST, _LARGEST)
    recurrent_kernel = gating.spread(params.recurrent_kernel, gating.of_hidden)
    parts = recurrent_kernel, gating.spread(input_kernel, gating.of_inputs), params.bias[None]
    packed = pack_gates(gating, jnp.concatenate([part.astype(dtype) for part in parts]))
    width = 0 if gating.num_sums == 1 else len(params.bias)
    gates, cells, outputs, rows = _call(
        "forward",
        (inputs, packed, *carry, params.peepholes, _join_marks(marks, batch), terms),
        _floats(time, batch, width),
        *(_floats(time, *x.shape) for x in carry),
        _floats(time, batch, packed.shape[1] * _NUMBERS_IN_WORD[dtype], dtype=dtype),
        aliases={6: 0} if terms.shape[2] == width else None,
        kind=_KINDS.index(gating.name),
        features=inputs.shape[2],
    )
    return (LSTMCarry(cells[-1], outputs[-1]), outputs), (gates, cells, rows, outputs)


def backward(
    layer: Layer, residuals: Residuals, d_last: Any, d_outputs: Outputs
) -> tuple[Sums, Any]:
    """Return the cotangents of the sums, [time, batch, num_sums * hidden], and of the first carry.

    `d_last` and `d_outputs` are those of the last carry and of the outputs.
    """
    gating, dtype, _, params, _, carry, marks = layer
    gates, cells, _, outputs = residuals
    (time, batch, hidden), width = outputs.shape, len(params.bias)
    # The transposed kernel in tiles: [tiles, words, columns of a tile, in a word].
    numbers, tile = _NUMBERS_IN_WORD[dtype], _VECTORS * count_lanes()
    kernel = gating.spread(params.recurrent_kernel, gating.of_hidden).astype(dtype)
    rows_of_tiles = jnp.pad(kernel, ((0, -hidden % tile), (0, 0)))
    packed = rows_of_tiles.reshape(-1, tile, width // numbers, numbers).transpose(0, 2, 1, 3)
    arguments = gates, packed, *carry, cells, outputs, d_outputs, *d_last, params.peepholes
    aliases = {7: 1, 8: 2}  # The cotangents of the last carry become those of the first,
    if (gates.shape[2], dtype) == (width, "float32"):
        aliases[0] = 0  # and the gates those of the sums.
    d_sums, *d_carry = _call(
        "backward",
        (*arguments, _join_marks(marks, batch)),
        _floats(time, batch, width, dtype=dtype),
        *(_floats(*x.shape) for x in d_last),
        aliases=aliases,
        kind=_KINDS.index(gating.name),
    )
    return d_sums, LSTMCarry(*d_carry)


def differentiate_params(
    layer: Layer, residuals: Residuals, d_sums: Sums
) -> tuple[GatedParams, Float[Array, "time batch features"]]:
    """Return the cotangents of the parameters and of the inputs, from those of the sums."""
    gating, dtype, _, params, inputs, *_ = layer
    _, cells, rows, outputs = residuals
    (time, batch, hidden), features = outputs.shape, inputs.shape[2]
    flat, factors, x = (x.reshape(time * batch, x.shape[2]) for x in (d_sums, rows, inputs))
    d_kernel = matmul(factors, flat, transpose_a=True)
    by_inputs = gating.take(flat, gating.of_inputs)
    if dtype == "float32":
        d_input_kernel, bias = matmul(x, by_inputs, transpose_a=True), hidden
    else:
        bias = hidden + features
        d_input_kernel = gating.take(d_kernel[hidden:bias], gating.of_inputs)
    d_params = GatedParams(
        d_input_kernel,
        gating.take(d_kernel[:hidden], gating.of_hidden),
        d_kernel[bias],
        layer.differentiate_peepholes(d_sums, cells),
    )
    # XLA removes this matmul if its result is unused, as for one-hot inputs.
    d_inputs = matmul(by_inputs, params.input_kernel.astype(dtype), transpose_b=True)
    return d_params, d_inputs.reshape(inputs.shape)


_IMPLEMENTATION = vjp.Implementation(forward, backward, differentiate_params)


def run(layer: Layer) -> tuple[Any, Outputs]:
    """Run a layer with as many hidden units as the library needs, and return those of the layer.

    The rows of the added units are zero, so no other unit reads them. Their columns are tiny: zero
    times an infinite input would be NaN, and all units read zero times that NaN.
    """
    params, hidden = layer.params, layer.carry.hidden.shape[1]
    rows = jnp.pad(params.recurrent_kernel, ((0, -hidden % count_lanes()), (0, 0)))
    kernel, rows = (pad_units(x, hidden, 1e-20) for x in (params.input_kernel, rows))
    *carry, peepholes = _pad_state(layer.carry, params.peepholes)
    params = GatedParams(kernel, rows, pad_units(params.bias, hidden), peepholes)
    wide_layer = layer._replace(axis=1, params=params, carry=LSTMCarry(*carry))
    last, outputs = vjp.run(_IMPLEMENTATION, wide_layer)
    return _make_carry(layer.gating, last, hidden), outputs[..., :hidden]


def _pad_state(carry: Any, peepholes: Array | None) -> list[Array]:
    """Return cell state, hidden state and peepholes, padded; an array that is missing is empty."""
    hidden = carry.hidden
    peepholes = jnp.zeros((0, hidden.shape[1]), jnp.float32) if peepholes is None else peepholes
    arrays = getattr(carry, "cell", hidden[:, :0]), hidden, peepholes
    return [pad_units(x, hidden.shape[1]) for x in arrays]


def _make_carry(gating: Gating, arrays: Sequence[Array], hidden: int) -> Any:
    return gating.carry(*(x[:, :hidden] for x in arrays[-len(gating.carry._fields) :]))


def pad_units(x: Array, hidden: int, value: float = 0) -> Array:
    """Return [..., n * hidden] with a value for more hidden units, up to whole vectors."""
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // hidden, hidden)
    padding = *[(0, 0)] * x.ndim, (0, -hidden % count_lanes())
    parts = jnp.pad(parts, padding, constant_values=value)
    return parts.reshape(*x.shape[:-1], parts.shape[-2] * parts.shape[-1])


def _join_marks(marks: Marks, batch: int) -> Array:
    """Return `RESET`, `FROZEN` or 0 for each step, uint8 [time, batch]."""
    pairs = (marks.reset, RESET), (marks.frozen, FROZEN)
    codes = [mask.astype("uint8") * code for mask, code in pairs if mask is not None]
    return sum(codes[1:], codes[0]) if codes else jnp.zeros((0, batch), "uint8")


def pack_gates(gating: Gating, kernel: Array) -> Array:
    """Arrange a kernel [depth, num_sums * hidden] in tiles: [tiles, words, 4, lanes, in a word].

    The 4 vectors of a tile are the sums of a vector of hidden units, or the only sum of 4 vectors.
    Zeros fill the last word.
    """
    words, numbers, num_sums = kernel, _NUMBERS_IN_WORD[kernel.dtype.name], gating.num_sums
    if numbers == 2:  # Join the bits of two rows, which is faster than `jnp.stack`.
        bits = jnp.pad(kernel, ((0, len(kernel) % 2), (0, 0)))
        bits = jax.lax.bitcast_convert_type(bits, "uint16").astype("uint32")
        words = bits[::2] | bits[1::2] << 16
    vectors, lanes = _VECTORS // num_sums, count_lanes()  # Vectors of hidden units in a tile.
    parts = words.reshape(len(words), num_sums, -1)
    parts = jnp.pad(parts, (*[(0, 0)] * 2, (0, -parts.shape[2] % (vectors * lanes))))
    parts = parts.reshape(*parts.shape[:2], -1, vectors, lanes).transpose(2, 0, 3, 1, 4)
    tiles = parts.reshape(*parts.shape[:2], _VECTORS, lanes)
    return jax.lax.bitcast_convert_type(tiles, kernel.dtype).reshape(*tiles.shape, numbers)


def run_step(
    gating: Gating, packed: Array, rows: Array, terms: Array, carry: Any, peepholes: Array | None
) -> Any:
    """Run one step of a layer and return the next carry.

    The kernel is from `pack_gates`, for any hidden size, and multiplies the rows [batch, depth].
    `terms` [batch or 1, num_sums * hidden] are added to the sums.
    """
    size, rows = carry.hidden.shape[1], jnp.clip(rows, -_LARGEST, _LARGEST).astype(packed.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % packed.shape[-1])))
    *state, peepholes = _pad_state(carry, peepholes)
    arguments = rows, packed, pad_units(terms, size), *state, peepholes
    results = [_floats(*x.shape) for x in state]
    next_state = _call("step", arguments, *results, kind=_KINDS.index(gating.name))
    return _make_carry(gating, next_state, size)


def matmul(a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """Return a @ b in float32, for matrices of one dtype, each of which may be transposed first."""
    numbers = _NUMBERS_IN_WORD[a.dtype.name]
    rows, depth = a.shape[::-1] if transpose_a else a.shape
    width, tile = len(b) if transpose_b else b.shape[1], _VECTORS * count_lanes()
    words, threads = -(-depth // numbers), native.count_threads()
    # The smaller factor is packed, and each thread packs a block of the other one at a time.
    most = min(words, _LARGEST_DEPTH)
    packed, block = rows * most, most * tile
    if rows > width:
        packed, block = -(-width // tile) * tile * words, _BLOCK * _DEPTH
    results = _floats(rows, width), _words(packed), _words(threads, block)
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
        *(_floats(rows), _floats(rows)),
        _floats(*((rows, width) if differentiable else (0, 0)), dtype=dtype),
        _words(tiles * tile * words),
        _words(threads, _BLOCK * _DEPTH),
        _words(threads, _BLOCK, tiles * tile),
        is_transposed=is_transposed,
    )
    return jnp.log(sums) + shifted, d_logits


def _floats(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _words(*shape: int) -> jax.ShapeDtypeStruct:
    """Return working memory; as integers, so that `jax_debug_nans` does not check it."""
    return jax.ShapeDtypeStruct(shape, "uint32")


def _call(
    name: str,
    arguments: Sequence[Any],
    *results: jax.ShapeDtypeStruct,
    aliases: dict[int, int] | None = None,
    **attributes: int,
) -> Sequence[Array]:
    """Call a function of the library, which divides its work into a part for each thread.

    `aliases` maps an argument to the result that has its memory.
    """
    library = native.load_library()
    assert library
    target = f"{library.name}-{name}"  # Compiled programs, including cached ones, call it by this.
    options: Any = {"vmap_method": "sequential", "input_output_aliases": aliases}
    attributes["parts"] = native.count_threads()
    call = jax.ffi.ffi_call(target, results, **options)
    outputs = call(*arguments, **{key: np.int64(value) for key, value in attributes.items()})
    aligned: Sequence[Array] = align([*arguments, *outputs])[len(arguments) :]
    return aligned
