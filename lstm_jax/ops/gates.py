"""Define the gated recurrences: their parameters, their carry, and a step without its matmuls.

A step first computes sums, [batch, hidden] each, of which most read the inputs x and the hidden
state h: x W + h U + b. A `Gating` is the rest: an elementwise function from the sums and the carry
to the next carry and to factors (`activate`), by which `pull_back` multiplies the cotangents of the
carry; `lstm.c` has the same in C. All implementations share the `Layer` and the functions at the
end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

Arrays = tuple[Array, ...]
Outputs = Float[Array, "time batch hidden"]
Sums = Float[Array, "time batch sums"]
_NOTHING: Any = None


class LSTMParams(NamedTuple):
    """Parameters of an LSTM layer; the last axis holds the gates i, f, g, o."""

    input_kernel: Float[Array, "features 4*hidden"]  # W.
    recurrent_kernel: Float[Array, "hidden 4*hidden"]  # U.
    bias: Float[Array, " 4*hidden"]

    @classmethod
    def init(cls, key: Array, features: int, hidden: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Draw the kernels; biases are 1 for the forget gate (Jozefowicz et al. 2015), else 0."""
        w, u, bias = draw_params(key, features, hidden, 4, dtype)
        return cls(w, u, bias.at[hidden : 2 * hidden].set(1))


class PeepholeLSTMParams(NamedTuple):
    """Parameters of an LSTM layer whose gates i, f, o see the cell state."""

    input_kernel: Float[Array, "features 4*hidden"]  # W.
    recurrent_kernel: Float[Array, "hidden 4*hidden"]  # U.
    bias: Float[Array, " 4*hidden"]
    peepholes: Float[Array, "3 hidden"]  # pi, pf, po.

    @classmethod
    def init(cls, key: Array, features: int, hidden: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Draw the parameters of an LSTM; peepholes are 0."""
        return cls(*LSTMParams.init(key, features, hidden, dtype), jnp.zeros((3, hidden), dtype))


class GRUParams(NamedTuple):
    """Parameters of a GRU layer; the last axis holds the gates r, z, n."""

    input_kernel: Float[Array, "features 3*hidden"]  # W.
    recurrent_kernel: Float[Array, "hidden 3*hidden"]  # U.
    bias: Float[Array, " 3*hidden"]
    recurrent_bias: Float[Array, " hidden"]  # un.

    @classmethod
    def init(cls, key: Array, features: int, hidden: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Draw the kernels; biases are 0."""
        return cls(*draw_params(key, features, hidden, 3, dtype), jnp.zeros(hidden, dtype))


class RNNParams(NamedTuple):
    """Parameters of a simple recurrent layer."""

    input_kernel: Float[Array, "features hidden"]  # W.
    recurrent_kernel: Float[Array, "hidden hidden"]  # U.
    bias: Float[Array, " hidden"]

    @classmethod
    def init(cls, key: Array, features: int, hidden: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Draw the kernels; biases are 0."""
        return cls(*draw_params(key, features, hidden, 1, dtype))


def draw_params(
    key: Array, features: int, hidden: int, gates: int, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Draw a Glorot uniform input kernel and an orthogonal recurrent kernel; biases are 0."""
    if features < 1 or hidden < 1:
        raise ValueError(
            f"features={features}, hidden={hidden}: a layer needs at least one of each"
        )
    keys, width = jax.random.split(key), gates * hidden
    glorot, orthogonal = jax.nn.initializers.glorot_uniform(), jax.nn.initializers.orthogonal()
    input_kernel = glorot(keys[0], (features, width), dtype)
    # LAPACK has no orthogonal matrices in half precision.
    wide = jnp.promote_types(dtype, "float32")
    recurrent_kernel = orthogonal(keys[1], (hidden, width), wide).astype(dtype)
    return input_kernel, recurrent_kernel, jnp.zeros(width, dtype)


class LSTMCarry(NamedTuple):
    """The carry of an LSTM layer."""

    cell: Float[Array, "batch hidden"]  # The cell state c.
    hidden: Float[Array, "batch hidden"]  # The hidden state h, which is also the layer's output.

    @classmethod
    def zeros(cls, batch: int, hidden: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Return a carry of zeros, each array with memory of its own, so that it can be donated."""
        return cls(*(jnp.zeros((batch, hidden), dtype) for _ in cls._fields))


class HiddenCarry(NamedTuple):
    """The carry of a layer without a cell state."""

    hidden: Float[Array, "batch hidden"]  # It is also the layer's output.

    @classmethod
    def zeros(cls, batch: int, hidden: int, dtype: DTypeLike = jnp.float32) -> Self:
        """Return a carry of zeros."""
        return cls(jnp.zeros((batch, hidden), dtype))


class GatedParams(NamedTuple):
    """The parameters of any gated layer, as implementations read them."""

    input_kernel: Float[Array, "features columns"]  # For the sums that read the inputs.
    recurrent_kernel: Float[Array, "hidden columns"]  # For the sums that read the hidden state.
    bias: Float[Array, " sums"]  # Of all sums.
    peepholes: Float[Array, "3 hidden"] | None = None


def expand(params: Any) -> GatedParams:
    """Return parameters, such as `LSTMParams`, as those of any layer."""
    if not isinstance(params, GRUParams):
        return GatedParams(*params)
    gates, candidate = jnp.split(params.bias, [2 * len(params.recurrent_bias)])
    return GatedParams(*params[:2], jnp.concatenate([gates, params.recurrent_bias, candidate]))


class Gating(NamedTuple):
    """A gated recurrence. Sums and factors are tuples of arrays of any one shape."""

    name: str
    params: type[Any]  # A NamedTuple, for `expand`.
    carry: type[Any]
    # Which sums read the inputs, and which the hidden state. A kernel has columns for each of them.
    of_inputs: tuple[int, ...]
    of_hidden: tuple[int, ...]
    # (sums, carry, peepholes or None) -> (next carry, factors).
    activate: Callable[[Arrays, Any, Any], tuple[Any, Arrays]]
    # (factors, cotangent of the next carry) -> (cotangents of the sums, cotangent of the carry).
    # That of the hidden state lacks what passes through h U; it is None unless `keeps_hidden`.
    pull_back: Callable[[Arrays, Any], tuple[Arrays, Any]]
    keeps_hidden: bool = False  # Whether a step keeps a part of the hidden state.

    @property
    def num_sums(self) -> int:
        """Return the number of sums of a hidden unit."""
        return len({*self.of_inputs, *self.of_hidden})

    def take(self, x: Float[Array, "... sums"], sums: tuple[int, ...]) -> Float[Array, "... _"]:
        """Return the columns of some sums from those of all, [..., num_sums * hidden]."""
        if len(sums) == self.num_sums:
            return x
        parts = jnp.split(x, self.num_sums, axis=-1)
        return jnp.concatenate([parts[i] for i in sums], axis=-1)

    def spread(self, x: Float[Array, "... _"], sums: tuple[int, ...]) -> Float[Array, "... sums"]:
        """Return columns for all sums, zero in those that are not among `sums`."""
        if len(sums) == self.num_sums:
            return x
        parts = dict(zip(sums, jnp.split(x, len(sums), axis=-1), strict=True))
        zeros = jnp.zeros_like(parts[0])
        return jnp.concatenate([parts.get(i, zeros) for i in range(self.num_sums)], axis=-1)

    def add_sums(self, bias: Array, by_inputs: Array, by_hidden: Array, axis: int) -> Arrays:
        """Return the sums of a step, from x W + b and h U, with features along an axis."""
        x, h = (
            dict(zip(sums, jnp.split(part, len(sums), axis), strict=True))
            for sums, part in ((self.of_inputs, by_inputs), (self.of_hidden, by_hidden))
        )
        biases = jnp.split(jnp.expand_dims(bias, 1 - axis), self.num_sums, axis)
        x = {i: x.get(i, bias) for i, bias in enumerate(biases)}
        return tuple(h[i] + x[i] if i in h else x[i] for i in x)


def sigmoid(x: Array) -> Array:
    """Compute `jax.nn.sigmoid`, faster on XLA's CPU backend: without an exponential."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _activate_lstm(
    sums: Arrays, carry: LSTMCarry, peepholes: Array | None
) -> tuple[LSTMCarry, Arrays]:
    """Return the next carry and factors.

    These are the derivatives of c' by the sums of i, f and g, of h' by that of o, dh'/dc', dc'/dc.
    """
    i, f, g, o = sums
    if peepholes is not None:
        pi, pf, po = peepholes
        i, f = i + pi * carry.cell, f + pf * carry.cell
    i, f, g = sigmoid(i), sigmoid(f), jnp.tanh(g)
    cell = f * carry.cell + i * g
    o = sigmoid(o if peepholes is None else o + po * cell)
    activated = jnp.tanh(cell)
    by_i, by_f, by_g = g * i * (1 - i), carry.cell * f * (1 - f), i * (1 - g**2)
    by_o, by_cell = activated * o * (1 - o), o * (1 - activated**2)
    if peepholes is not None:
        by_cell, f = by_cell + by_o * po, f + by_i * pi + by_f * pf
    return LSTMCarry(cell, o * activated), (by_i, by_f, by_g, by_o, by_cell, f)


def _pull_back_lstm(factors: Arrays, d_after: LSTMCarry) -> tuple[Arrays, LSTMCarry]:
    by_i, by_f, by_g, by_o, by_cell, by_old_cell = factors
    d_cell, d_hidden = d_after.cell + d_after.hidden * by_cell, d_after.hidden
    d_sums = d_cell * by_i, d_cell * by_f, d_cell * by_g, d_hidden * by_o
    return d_sums, LSTMCarry(d_cell * by_old_cell, _NOTHING)


def _activate_gru(sums: Arrays, carry: HiddenCarry, _: None) -> tuple[HiddenCarry, Arrays]:
    """Return the next carry and factors: the derivatives of h' by the sums and by h."""
    r, z, q, n = sums  # Of the candidate, q is h U + un, and n is x W + b.
    r, z = sigmoid(r), sigmoid(z)
    n = jnp.tanh(n + r * q)
    by_n = (1 - z) * (1 - n**2)
    factors = by_n * q * r * (1 - r), (carry.hidden - n) * z * (1 - z), by_n * r, by_n, z
    return HiddenCarry((1 - z) * n + z * carry.hidden), factors


def _pull_back_gru(factors: Arrays, d_after: HiddenCarry) -> tuple[Arrays, HiddenCarry]:
    *d_sums, d_hidden = (d_after.hidden * factor for factor in factors)
    return tuple(d_sums), HiddenCarry(d_hidden)


def _activate_rnn(sums: Arrays, carry: HiddenCarry, _: None) -> tuple[HiddenCarry, Arrays]:
    hidden = jnp.tanh(sums[0])
    return HiddenCarry(hidden), (1 - hidden**2,)


def _pull_back_rnn(factors: Arrays, d_after: HiddenCarry) -> tuple[Arrays, HiddenCarry]:
    return (d_after.hidden * factors[0],), HiddenCarry(_NOTHING)


_FOUR = 0, 1, 2, 3
LSTM = Gating("lstm", LSTMParams, LSTMCarry, _FOUR, _FOUR, _activate_lstm, _pull_back_lstm)
PEEPHOLE_LSTM = LSTM._replace(name="peephole_lstm", params=PeepholeLSTMParams)
_GRU_SUMS = (0, 1, 3), (0, 1, 2)
GRU = Gating("gru", GRUParams, HiddenCarry, *_GRU_SUMS, _activate_gru, _pull_back_gru, True)
RNN = Gating("rnn", RNNParams, HiddenCarry, (0,), (0,), _activate_rnn, _pull_back_rnn)
GATINGS: dict[type[Any], Gating] = {
    gating.params: gating for gating in (LSTM, PEEPHOLE_LSTM, GRU, RNN)
}


class Marks(NamedTuple):
    """Steps that do not simply read the carry; None means that there are none."""

    reset: Bool[Array, "time batch"] | None  # They read a carry of zeros.
    frozen: Bool[Array, "time batch"] | None  # They leave the carry as it is; outputs aren't used.


class Layer(NamedTuple):
    """A gated layer, and all that it reads. Its arrays have one floating-point dtype."""

    gating: Gating
    dtype: str  # What operands of matmuls are rounded to, "float32" or "bfloat16".
    axis: int  # Of the features in the arrays of a step: 0 in XLA on CPUs, otherwise 1.
    params: GatedParams
    inputs: Float[Array, "time batch features"]
    carry: Any  # Before the first step.
    marks: Marks

    def differentiate_peepholes(self, d_sums: Sums, cells: Outputs) -> Array | None:
        """Return the cotangent of the peephole weights, if there are any, from all cell states."""
        if self.params.peepholes is None or not len(self.params.peepholes):
            return self.params.peepholes
        old_cells = clear(jnp.concatenate([self.carry.cell[None], cells[:-1]]), self.marks.reset)
        d_i, d_f, _, d_o = jnp.split(d_sums.astype(cells.dtype), 4, axis=2)
        terms = d_i * old_cells, d_f * old_cells, d_o * cells
        return jnp.stack([term.sum(axis=(0, 1)) for term in terms])


def clear(tree: Any, reset: Bool[Array, "..."] | None, axis: int = -1) -> Any:
    """Return arrays that are zero where `reset`, bool without this axis of features, is true."""
    if reset is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(reset, axis), 0, x), tree)


def align(arrays: Any) -> Any:
    """Let all arrays vary over the same axes of a mesh, in a `shard_map` that checks them."""
    leaves, structure = jax.tree.flatten(arrays)
    axes = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    union = frozenset().union(*axes)
    aligned = [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(structure, aligned)
