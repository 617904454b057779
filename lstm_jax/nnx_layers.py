"""Recurrent layers of Flax's NNX, in place of `nnx.RNN(nnx.OptimizedLSTMCell(m, n, rngs=rngs))`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lstm_jax import ops
from lstm_jax.layers import Stack
from lstm_jax.ops.api import Name


class LSTM(Stack, nnx.Module):
    """Run LSTM layers over time; options, call and carries are those of `lstm_jax.layers.LSTM`.

        layer = LSTM(64, 256, rngs=nnx.Rngs(0))
        outputs = layer(inputs)

    Each array of the parameters is an `nnx.Param`, such as `layer.l0.bias`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        reverse: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Name = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.num_layers, self.bidirectional, self.reverse = num_layers, bidirectional, reverse
        self.dtype, self.implementation = dtype, implementation
        sides = ("", "_reverse") if bidirectional else ("",)
        for i in range(num_layers):
            features = len(sides) * hidden_features if i else in_features
            for side in sides:
                tree = self.params_type.init(rngs.params(), features, hidden_features, param_dtype)
                setattr(self, f"l{i}{side}", nnx.Dict(jax.tree.map(nnx.Param, tree._asdict())))

    def _get_params(self, name: str, features: int) -> Any:
        arrays = getattr(self, name)
        return self.params_type(**{key: array.get_value() for key, array in arrays.items()})


class PeepholeLSTM(LSTM):
    """Run LSTM layers whose gates see the cell state; see `ops.peephole_lstm` and `LSTM`."""

    params_type = ops.PeepholeLSTMParams


class GRU(LSTM):
    """Run GRU layers in place of `nnx.RNN(nnx.GRUCell(m, n))`; see `ops.gru` and `LSTM`."""

    params_type = ops.GRUParams


class RNN(LSTM):
    """Run simple recurrent layers; see `ops.rnn` and `LSTM`."""

    params_type = ops.RNNParams
