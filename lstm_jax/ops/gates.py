"""Define the gated recurrences: their parameters, their carry, and a step without its matmuls.

A step first computes sums, [batch, hidden] each, of which most read the inputs x and the hidden
state h: x W + h U + b. A `Gating` is the rest, elementwise functions from the sums and the carry to
the next carry (`activate`), and their derivatives (`derive`, `pull_back`), which XLA's loop uses;
`lstm.c` has the same in C. All implementations share the `Layer` and the functions at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

Arrays = tuple[Array, ...]
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
) -> tuple[
    Float[Array, "features columns"], Float[Array, "hidden columns"], Float[Array, " columns"]
]:
    """Draw a Glorot uniform input kernel and an orthogonal recurrent kernel, as Keras does.

    Also return biases of 0. Raise ValueError without features or hidden units.
    """
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


class Gating(NamedTuple):
    """A gated recurrence. Sums and gates are tuples of arrays of any one shape."""

    name: str
    params: type[Any]  # A NamedTuple; what it has after `bias` belongs to sums or to `activate`.
    carry: type[Any]
    num_gates: int  # The columns of W and of U for each hidden unit.
    # (sums, carry, peepholes or None) -> (gates, next carry). All sums have a bias.
    activate: Callable[[Arrays, Any, Any], tuple[Arrays, Any]]
    # (gates, carry, next carry, peepholes) -> factors, with which `pull_back` multiplies.
    derive: Callable[[Arrays, Any, Any, Any], Arrays]
    # (factors, cotangent of the next carry) -> (cotangents of the sums, cotangent of the carry).
    # In the latter, the hidden state is without the part through h U: None unless `keeps_hidden`.
    pull_back: Callable[[Arrays, Any], tuple[Arrays, Any]]
    num_factors: int
    keeps_hidden: bool = False  # Whether a step keeps a part of the hidden state.

    @property
    def num_sums(self) -> int:
        """Return the number of sums of a hidden unit; a GRU's candidate has two.

        The first of them, h U + un, is multiplied by the reset gate, and the second is x W + b.
        """
        return self.num_gates + (self.params is GRUParams)

    @property
    def has_cell(self) -> bool:
        """Return whether the carry has a cell state."""
        return self.carry is LSTMCarry

    @property
    def has_peepholes(self) -> bool:
        """Return whether gates see the cell state."""
        return self.params is PeepholeLSTMParams

    def join_biases(self, params: Any) -> Array:
        """Return the biases of all sums, [num_sums * hidden]."""
        if not isinstance(params, GRUParams):
            return params.bias
        own, un = jnp.split(params.bias, [2 * len(params.recurrent_bias)]), params.recurrent_bias
        return jnp.concatenate([own[0], un, own[1]])

    def split_biases(self, bias: Array) -> Arrays:
        """Return the parameters of `join_biases`, from an array like its result."""
        by_inputs, _ = self.split_columns(bias[None])
        if self.params is GRUParams:
            return by_inputs[0], bias[len(bias) // 2 : 3 * len(bias) // 4]
        return (bias,)

    def split_columns(
        self, x: Float[Array, "n sums"]
    ) -> tuple[Float[Array, "n columns"], Float[Array, "n columns"]]:
        """Return the columns of the sums that read the inputs, and of those that read h."""
        if self.params is not GRUParams:
            return x, x
        r, z, q, n = jnp.split(x, 4, axis=1)
        return jnp.concatenate([r, z, n], axis=1), jnp.concatenate([r, z, q], axis=1)

    def add_sums(
        self,
        params: Any,
        from_inputs: Float[Array, "..."],
        from_hidden: Float[Array, "..."],
        axis: int = 1,
    ) -> Arrays:
        """Return the sums of a step, from x W + b and h U, with features along an axis."""
        of_inputs, of_hidden = (
            jnp.split(x, self.num_gates, axis) for x in (from_inputs, from_hidden)
        )
        if self.params is not GRUParams:
            return tuple(h + x for x, h in zip(of_inputs, of_hidden, strict=True))
        (xr, xz, xn), (hr, hz, hn) = of_inputs, of_hidden
        return hr + xr, hz + xz, hn + jnp.expand_dims(params.recurrent_bias, 1 - axis), xn

    def spread_kernels(
        self, params: Any
    ) -> tuple[Float[Array, "features sums"], Float[Array, "hidden sums"]]:
        """Return both kernels with columns for all sums, zero in those of a GRU's candidate."""
        w, u = params.input_kernel, params.recurrent_kernel
        if self.params is not GRUParams:
            return w, u
        gates, candidate = jnp.split(w, [2 * len(u)], axis=1)
        w = jnp.concatenate([gates, jnp.zeros_like(candidate), candidate], axis=1)
        return w, jnp.pad(u, ((0, 0), (0, len(u))))


def sigmoid(x: Array) -> Array:
    """Compute `jax.nn.sigmoid`, faster on XLA's CPU backend: without an exponential."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _activate_lstm(sums: Arrays, carry: LSTMCarry, _: None) -> tuple[Arrays, LSTMCarry]:
    i, f, g, o = sums
    i, f, g, o = sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)
    cell = f * carry.cell + i * g
    return (i, f, g, o), LSTMCarry(cell, o * jnp.tanh(cell))


def _derive_lstm(gates: Arrays, before: LSTMCarry, after: LSTMCarry, _: None) -> Arrays:
    """Return the derivatives of c' by i, f and g's sums, of h' by o's, dh'/dc' and dc'/dc."""
    i, f, g, o = gates
    activated = jnp.tanh(after.cell)
    by_sums = g * i * (1 - i), before.cell * f * (1 - f), i * (1 - g**2), activated * o * (1 - o)
    return *by_sums, o * (1 - activated**2), f


def _pull_back_lstm(factors: Arrays, d_after: LSTMCarry) -> tuple[Arrays, LSTMCarry]:
    by_i, by_f, by_g, by_o, by_cell, kept = factors
    d_cell, d_hidden = d_after.cell + d_after.hidden * by_cell, d_after.hidden
    d_sums = d_cell * by_i, d_cell * by_f, d_cell * by_g, d_hidden * by_o
    return d_sums, LSTMCarry(d_cell * kept, _NOTHING)


def _activate_peephole(
    sums: Arrays, carry: LSTMCarry, peepholes: Array
) -> tuple[Arrays, LSTMCarry]:
    i, f, g, o = sums
    pi, pf, po = peepholes
    i, f, g = sigmoid(i + pi * carry.cell), sigmoid(f + pf * carry.cell), jnp.tanh(g)
    cell = f * carry.cell + i * g
    o = sigmoid(o + po * cell)
    return (i, f, g, o), LSTMCarry(cell, o * jnp.tanh(cell))


def _derive_peephole(
    gates: Arrays, before: LSTMCarry, after: LSTMCarry, peepholes: Array
) -> Arrays:
    by_i, by_f, by_g, by_o, by_cell, kept = _derive_lstm(gates, before, after, None)
    pi, pf, po = peepholes
    return by_i, by_f, by_g, by_o, by_cell + by_o * po, kept + by_i * pi + by_f * pf


def _activate_gru(sums: Arrays, carry: HiddenCarry, _: None) -> tuple[Arrays, HiddenCarry]:
    r, z, q, n = sums  # Of the candidate, q is h U + un, and n is x W + b.
    r, z = sigmoid(r), sigmoid(z)
    n = jnp.tanh(n + r * q)
    return (r, z, q, n), HiddenCarry((1 - z) * n + z * carry.hidden)


def _derive_gru(gates: Arrays, before: HiddenCarry, after: HiddenCarry, _: None) -> Arrays:
    """Return the derivatives of h' by the sums of r, z, q and n, and by h."""
    r, z, q, n = gates
    by_n = (1 - z) * (1 - n**2)
    return by_n * q * r * (1 - r), (before.hidden - n) * z * (1 - z), by_n * r, by_n, z


def _pull_back_gru(factors: Arrays, d_after: HiddenCarry) -> tuple[Arrays, HiddenCarry]:
    *by_sums, kept = (d_after.hidden * factor for factor in factors)
    return tuple(by_sums), HiddenCarry(kept)


def _activate_rnn(sums: Arrays, carry: HiddenCarry, _: None) -> tuple[Arrays, HiddenCarry]:
    hidden = jnp.tanh(sums[0])
    return (hidden,), HiddenCarry(hidden)


def _derive_rnn(gates: Arrays, before: HiddenCarry, after: HiddenCarry, _: None) -> Arrays:
    return (1 - gates[0] ** 2,)


def _pull_back_rnn(factors: Arrays, d_after: HiddenCarry) -> tuple[Arrays, HiddenCarry]:
    return (d_after.hidden * factors[0],), HiddenCarry(_NOTHING)


LSTM = Gating(
    name="lstm",
    params=LSTMParams,
    carry=LSTMCarry,
    num_gates=4,
    activate=_activate_lstm,
    derive=_derive_lstm,
    pull_back=_pull_back_lstm,
    num_factors=6,
)
PEEPHOLE_LSTM = LSTM._replace(
    name="peephole_lstm",
    params=PeepholeLSTMParams,
    activate=_activate_peephole,
    derive=_derive_peephole,
)
GRU = Gating(
    name="gru",
    params=GRUParams,
    carry=HiddenCarry,
    num_gates=3,
    activate=_activate_gru,
    derive=_derive_gru,
    pull_back=_pull_back_gru,
    num_factors=5,
    keeps_hidden=True,
)
RNN = Gating(
    name="rnn",
    params=RNNParams,
    carry=HiddenCarry,
    num_gates=1,
    activate=_activate_rnn,
    derive=_derive_rnn,
    pull_back=_pull_back_rnn,
    num_factors=1,
)


class Marks(NamedTuple):
    """Steps that do not simply read the carry; None is nowhere."""

    reset: Bool[Array, "time batch"] | None  # They read a carry of zeros.
    frozen: Bool[Array, "time batch"] | None  # They leave the carry as it is; outputs aren't used.


class Layer(NamedTuple):
    """A gated layer, and all that it reads. Its arrays have one floating-point dtype."""

    gating: Gating
    params: Any
    inputs: Float[Array, "time batch features"]
    carry: Any  # Before the first step.
    marks: Marks
    dtype: str  # What operands of matmuls are rounded to, "float32" or "bfloat16".


# `axis` is that of the features in an array of a step: the last, or 0 if the batch is last.


def clear(tree: Any, reset: Bool[Array, "..."] | None, axis: int = -1) -> Any:
    """Return arrays that are zero where `reset`, bool without the axis of features, is true."""
    if reset is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(reset, axis), 0, x), tree)


def keep(before: Any, after: Any, frozen: Bool[Array, "..."] | None, axis: int = -1) -> Any:
    """Return `before` where `frozen` is true, otherwise `after`."""
    if frozen is None:
        return after
    mask = jnp.expand_dims(frozen, axis)
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), before, after)


def add_hidden(carry: Any, term: Float[Array, "..."]) -> Any:
    """Add a term to the hidden state of a carry, which is None if it is zero."""
    return carry._replace(hidden=term if carry.hidden is None else carry.hidden + term)


def get_peepholes(params: Any, axis: int = 1) -> Float[Array, "3 ..."] | None:
    """Return the peephole weights [3, hidden], if there are any, with an axis for the batch."""
    peepholes = getattr(params, "peepholes", None)
    return None if peepholes is None else jnp.expand_dims(peepholes, 2 - axis)


def make_gradients(
    layer: Layer,
    d_kernels: Sequence[Array],
    d_bias: Float[Array, " sums"],
    d_sums: Float[Array, "time batch sums"],
    cells: Float[Array, "time batch hidden"],
) -> Any:
    """Return the cotangents of the parameters, whose kernels are the input and recurrent kernel.

    Only gates that see the cell states need `cells`.
    """
    gating, carry = layer.gating, layer.carry
    d_params = [*d_kernels, *gating.split_biases(d_bias)]
    if gating.has_peepholes:
        before = clear(jnp.concatenate([carry.cell[None], cells[:-1]]), layer.marks.reset)
        d_i, d_f, _, d_o = jnp.split(d_sums.astype(cells.dtype), 4, axis=2)
        terms = d_i * before, d_f * before, d_o * cells
        d_params.append(jnp.stack([term.sum(axis=(0, 1)) for term in terms]))
    return gating.params(*d_params)


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
