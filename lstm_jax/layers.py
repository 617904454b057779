"""Recurrent layers of Flax's Linen, which take the place of `nn.RNN(nn.OptimizedLSTMCell(n))`.

`nnx_layers.py` has those of NNX.
"""

from typing import Any, ClassVar, Literal, TypedDict, Unpack, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lstm_jax import ops
from lstm_jax.ops.api import Name
from lstm_jax.ops.gates import GATINGS


class Options(TypedDict, total=False):
    """The keyword arguments of a call besides `return_carry`, all optional."""

    initial_carry: Any  # By default zeros.
    seq_lengths: ArrayLike | None  # Integers [batch].
    reset: ArrayLike | None  # [batch, time].
    reverse: bool | None


class Stack:
    """The call of all layers, of Linen and of NNX. `LSTM` explains the attributes."""

    num_layers: int
    bidirectional: bool
    reverse: bool
    dtype: DTypeLike | None
    implementation: Name
    params_type: ClassVar[Any] = ops.LSTMParams

    def _get_params(self, name: str, features: int) -> Any:
        """Return the parameters of a layer and direction with this number of input features."""
        raise NotImplementedError

    @overload
    def __call__(
        self, inputs: ArrayLike, *, return_carry: Literal[False] = ..., **options: Unpack[Options]
    ) -> jax.Array: ...
    @overload
    def __call__(
        self, inputs: ArrayLike, *, return_carry: Literal[True], **options: Unpack[Options]
    ) -> tuple[Any, jax.Array]: ...
    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        seq_lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        return_carry: bool = False,
        reverse: bool | None = None,
    ) -> Any:
        """Return the outputs [batch, time, features], with `return_carry` after the last carry.

        The carry of an LSTM is (cell, hidden), that of another layer is the hidden state, each
        [batch, features]. With several layers or directions, it is a tuple: the carry of layer 0,
        the one of its other direction, then those of layer 1. Unless it is None,
        `reverse` has priority over the attribute.

        Raises:
          ValueError: if a shape or dtype does not fit.
        """
        reverse = self.reverse if reverse is None else reverse
        directions = [("", reverse), ("_reverse", not reverse)][: 2 if self.bidirectional else 1]
        count = self.num_layers * len(directions)
        carries = [None] * count if initial_carry is None else initial_carry
        carries = [initial_carry] if count == 1 else carries
        if len(carries) != count:
            raise ValueError(f"initial_carry holds {len(carries)} carries: it must hold {count}")
        first, last, outputs = iter(carries), [], inputs
        for i in range(self.num_layers):
            parts = []
            for suffix, backward in directions:
                params = self._get_params(f"l{i}{suffix}", outputs.shape[-1])
                carry, one = ops.run(
                    params,
                    outputs,
                    _wrap(self.params_type, next(first)),
                    reset=_mark_ends(reset, seq_lengths) if backward else reset,
                    lengths=seq_lengths,
                    reverse=backward,
                    dtype=self.dtype,
                    implementation=self.implementation,
                )
                last.append(tuple(carry) if len(carry) > 1 else carry.hidden)
                parts.append(one)
            outputs = jnp.concatenate(parts, axis=-1)
        return (last[0] if count == 1 else tuple(last), outputs) if return_carry else outputs


def _wrap(params_type: Any, carry: Any) -> Any:
    """Return the carry of a layer, or a tuple of arrays or an array, as `ops` takes it."""
    kind, arrays = GATINGS[params_type].carry, carry if isinstance(carry, tuple) else (carry,)
    return carry if carry is None or len(arrays) != len(kind._fields) else kind(*arrays)


def _mark_ends(reset: ArrayLike | None, lengths: ArrayLike | None) -> jax.Array | None:
    """Return where documents end, [batch, time], from where they start."""
    if reset is None:
        return None
    reset = jnp.asarray(reset).astype(bool)
    if lengths is not None:  # No document starts in the padding.
        reset &= jnp.arange(reset.shape[1]) < jnp.asarray(lengths)[:, None]
    return jnp.pad(reset, ((0, 0), (0, 1)))[:, 1:]


class LSTM(Stack, nn.Module):
    """Run LSTM layers over time; the call is that of `flax.linen.RNN`.

        layer = LSTM(256)
        variables = layer.init(jax.random.key(0), inputs)
        outputs = layer.apply(variables, inputs)

    It differs from Flax in this:

    - Inputs are [batch, time, features]. There is no `time_major`, `init_key` or `keep_order`.
    - Outputs beyond `seq_lengths` are zero, and a sequence of length 0 keeps its carry.
    - `return_carry` is an argument of the call only.
    - Outputs of `reverse` stay at the place of their inputs, as with Flax's `keep_order`.
    - The parameters of a layer are the arrays of `ops.LSTMParams`, drawn by its `init`: Glorot
      uniform input kernels, orthogonal recurrent ones, 1 as the bias of the forget gate.
    - `reset` [batch, time] is true at the first step of a document or an episode, which reads a
      carry of zeros. A layer that runs backwards reads one at the last step of each document.
    - `dtype` is that of the matmuls' operands only.

    Attributes:
      features: the number of hidden units in each layer and direction.
      num_layers: the number of layers, each of which reads the outputs of the one before.
      bidirectional: whether each layer also runs in the other direction. Outputs are
        [batch, time, 2 * features], this direction first.
      reverse: whether to run from the last step to the first.
      dtype: the argument of `ops.lstm`.
      param_dtype: the dtype of parameters.
      implementation: the argument of `ops.lstm`.
    """

    features: int
    num_layers: int = 1
    bidirectional: bool = False
    reverse: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    implementation: Name = "auto"

    __call__ = nn.compact(Stack.__call__)

    def _get_params(self, name: str, features: int) -> Any:
        def init(key: jax.Array) -> dict[str, jax.Array]:
            params = self.params_type.init(key, features, self.features, self.param_dtype)
            return dict(params._asdict())

        return self.params_type(**self.param(name, init))


class PeepholeLSTM(LSTM):
    """Run LSTM layers whose gates see the cell state; see `ops.peephole_lstm` and `LSTM`."""

    params_type = ops.PeepholeLSTMParams


class GRU(LSTM):
    """Run GRU layers in place of `nn.RNN(nn.GRUCell(n))`; see `ops.gru` and `LSTM`."""

    params_type = ops.GRUParams


class RNN(LSTM):
    """Run simple recurrent layers; see `ops.rnn` and `LSTM`."""

    params_type = ops.RNNParams
