"""Read and write the parameters of layers as PyTorch and Flax store them.

PyTorch's kernels are transposed, and Flax has one kernel for each gate. The equations are the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lstm_jax.ops.gates import GRUParams, LSTMParams, RNNParams

Params = LSTMParams | GRUParams | RNNParams

# The names of the gates, in their order, by type; Flax uses them.
_GATES: dict[type[Any], Sequence[str]] = {
    LSTMParams: ("i", "f", "g", "o"),
    GRUParams: ("r", "z", "n"),
    RNNParams: ("",),
}


def from_torch(state_dict: Mapping[str, ArrayLike], layer: str = "l0", prefix: str = "") -> Params:
    """Return the parameters of a layer of PyTorch's `nn.LSTM`, `nn.GRU` or `nn.RNN` (tanh).

    The other direction of layer 0 is `layer="l0_reverse"`. In the `state_dict` of a larger module,
    `prefix` is the name of the layer and a dot. Without biases, they are 0.

    Raises:
      ValueError: if a kernel is missing, or the kernels are those of another layer.
    """
    *kernels, bias, recurrent_bias = _name_arrays(layer, prefix)
    if missing := [name for name in kernels if name not in state_dict]:
        found = [key for key in state_dict if "weight_ih_" in key] or state_dict
        raise ValueError(
            f"the state_dict has no {missing[0]}, but {', '.join(found) or 'nothing'}: pass as "
            "prefix= what is before weight_ih, and as layer= what is after it, such as 'l0'"
        )
    input_kernel, recurrent_kernel = (np.asarray(state_dict[name]).T for name in kernels)
    zeros = np.zeros(recurrent_kernel.shape[1], recurrent_kernel.dtype)
    biases = (np.asarray(state_dict.get(name, zeros)) for name in (bias, recurrent_bias))
    return _make(input_kernel, recurrent_kernel, *biases)


def to_torch(params: Params, layer: str = "l0", prefix: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of a layer in a `state_dict` of PyTorch; see `from_torch`."""
    _get_gates(params)  # It checks the type.
    input_kernel, recurrent_kernel, bias = map(np.asarray, params[:3])
    recurrent_bias = np.zeros_like(bias)
    if isinstance(params, GRUParams):
        recurrent_bias[-len(params.recurrent_bias) :] = params.recurrent_bias
    arrays = input_kernel.T, recurrent_kernel.T, bias, recurrent_bias
    return dict(zip(_name_arrays(layer, prefix), arrays, strict=True))


def _name_arrays(layer: str, prefix: str) -> list[str]:
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    return [f"{prefix}{name}_{layer}" for name in names]


def from_flax(params: Mapping[str, Mapping[str, ArrayLike]]) -> Params:
    """Return the parameters of Flax's LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell."""
    count = sum(name.startswith("h") for name in params)
    gates = next((gates for gates in _GATES.values() if len(gates) == count), None)
    if gates is None:
        raise ValueError(f"a cell with {count} recurrent kernels is no LSTM, GRU or simple RNN")

    def join(side: str) -> tuple[np.ndarray, np.ndarray]:
        own = [params[side + gate] for gate in gates]
        kernels = [np.asarray(gate["kernel"]) for gate in own]
        zeros = np.zeros(kernels[0].shape[1], kernels[0].dtype)
        biases = [np.asarray(gate.get("bias", zeros)) for gate in own]
        return np.concatenate(kernels, axis=1), np.concatenate(biases)

    (input_kernel, bias), (recurrent_kernel, recurrent_bias) = join("i"), join("h")
    return _make(input_kernel, recurrent_kernel, bias, recurrent_bias)


def to_flax(params: Params) -> dict[str, dict[str, np.ndarray]]:
    """Return the `params` of Flax's cell: OptimizedLSTMCell, GRUCell or SimpleCell."""
    gates, cell = _get_gates(params), dict[str, dict[str, np.ndarray]]()
    arrays = (np.split(np.asarray(x), len(gates), axis=-1) for x in params[:3])
    for gate, input_kernel, recurrent_kernel, bias in zip(gates, *arrays, strict=True):
        cell[f"i{gate}"], cell[f"h{gate}"] = {"kernel": input_kernel}, {"kernel": recurrent_kernel}
        cell[f"{'h' if isinstance(params, LSTMParams) else 'i'}{gate}"]["bias"] = bias
    if isinstance(params, GRUParams):
        cell["hn"]["bias"] = np.asarray(params.recurrent_bias)
    return cell


def _get_gates(params: Params) -> Sequence[str]:
    if type(params) not in _GATES:
        raise ValueError(f"PyTorch and Flax have no layer with {type(params).__name__}")
    return _GATES[type(params)]


def _make(input_kernel: Any, recurrent_kernel: Any, bias: Any, recurrent_bias: Any) -> Params:
    """Return parameters from arrays in the order of gates here, and biases of all gates each.

    Only in the candidate of a GRU are the biases not added to each other.
    """
    hidden, width = recurrent_kernel.shape
    kind = next((kind for kind, gates in _GATES.items() if len(gates) * hidden == width), None)
    if kind is None:
        raise ValueError(
            f"a recurrent kernel of {hidden} hidden units has {width} columns: those of an LSTM, "
            "a GRU and a simple RNN are 4, 3 and 1 for each hidden unit"
        )
    arrays = [input_kernel, recurrent_kernel, bias + recurrent_bias]
    if kind is GRUParams:
        arrays[2][-hidden:] = bias[-hidden:]
        arrays.append(recurrent_bias[-hidden:])
    params: Params = kind(*map(jnp.asarray, arrays))
    return params
