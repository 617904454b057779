"""Read and write the parameters of layers as PyTorch stores them: with kernels transposed."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lstm_jax.ops.gates import GRUParams, LSTMParams, RNNParams

Params = LSTMParams | GRUParams | RNNParams

# The number of gates. Both have them in this order.
_GATES: dict[type[Any], int] = {LSTMParams: 4, GRUParams: 3, RNNParams: 1}


def from_torch(state_dict: Mapping[str, ArrayLike], layer: str = "l0", prefix: str = "") -> Params:
    """Return the parameters of a layer of PyTorch's `nn.LSTM`, `nn.GRU` or `nn.RNN` (tanh).

    The other direction of layer 0 is `layer="l0_reverse"`. In the `state_dict` of a larger module,
    `prefix` is the name of the layer and a dot. Without biases, they are 0.

    Raises:
      ValueError: if a kernel is missing, or the kernels are those of another layer.
    """
    *kernels, bias, recurrent_bias = _name_arrays(layer, prefix)
    if missing := [name for name in kernels if name not in state_dict]:
        keys = [key for key in state_dict if "weight_ih_" in key] or state_dict
        raise ValueError(
            f"the state_dict has no {missing[0]}, but {', '.join(keys) or 'nothing'}: pass as "
            "prefix= what is before weight_ih, and as layer= what is after it, such as 'l0'"
        )
    input_kernel, recurrent_kernel = (np.asarray(state_dict[name]).T for name in kernels)
    hidden, width = recurrent_kernel.shape
    kind = next((kind for kind, gates in _GATES.items() if gates * hidden == width), None)
    if kind is None:
        raise ValueError(
            f"a recurrent kernel of {hidden} hidden units has {width} columns: those of an LSTM, "
            "a GRU and a simple RNN are 4, 3 and 1 for each hidden unit"
        )
    zeros = np.zeros(width, recurrent_kernel.dtype)
    first, second = (np.asarray(state_dict.get(name, zeros)) for name in (bias, recurrent_bias))
    arrays = [input_kernel, recurrent_kernel, first + second]
    if kind is GRUParams:  # Only in its candidate, biases are not added to each other.
        arrays[2][-hidden:] = first[-hidden:]
        arrays.append(second[-hidden:])
    params: Params = kind(*map(jnp.asarray, arrays))
    return params


def to_torch(params: Params, layer: str = "l0", prefix: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of a layer in a `state_dict` of PyTorch; see `from_torch`."""
    if type(params) not in _GATES:
        raise ValueError(f"PyTorch has no layer with {type(params).__name__}")
    input_kernel, recurrent_kernel, bias = map(np.asarray, params[:3])
    recurrent_bias = np.zeros_like(bias)
    if isinstance(params, GRUParams):
        recurrent_bias[-len(params.recurrent_bias) :] = params.recurrent_bias
    arrays = input_kernel.T, recurrent_kernel.T, bias, recurrent_bias
    return dict(zip(_name_arrays(layer, prefix), arrays, strict=True))


def _name_arrays(layer: str, prefix: str) -> list[str]:
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    return [f"{prefix}{name}_{layer}" for name in names]
