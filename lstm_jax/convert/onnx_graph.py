"""Write a model as an ONNX graph, which other runtimes execute.

ONNX's LSTM, GRU and RNN operators have the gates in another order, and kernels with the gates as
rows.
"""

import numpy as np

from lstm_jax.convert import weights as weights_lib
from lstm_jax.convert.weights import Weights

# By cell: the operator, its gates as indices of those of `lstm_jax.cells`, and its attributes.
_OPERATORS: dict[str, tuple[str, list[int], dict[str, int]]] = {
    "lstm": ("LSTM", [0, 3, 1, 2], {}),  # i, o, f, g.
    "gru": ("GRU", [1, 0, 2], {"linear_before_reset": 1}),  # z, r, n.
    "rnn": ("RNN", [0], {}),
}
_OPSET, _IR_VERSION = 17, 8  # Of 2022, for older runtimes.


def write_graph(weights: Weights) -> bytes:
    """Return a graph of the model, with the carry as inputs and outputs.

    It maps `ids`, int64 [batch, time], to `logits`, float32 [batch, time, vocabulary]. For each
    layer i it maps `hidden_i` to `next_hidden_i`, float32 [batch, hidden], and for an LSTM `cell_i`
    to `next_cell_i`; zeros are the carry at the start of a text.
    """
    onnx = weights_lib.require("onnx")
    make_node, describe = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    numbers = onnx.TensorProto
    operator, order, attributes = _OPERATORS[weights.cell]
    states = ["hidden", "cell"] if weights.cell == "lstm" else ["hidden"]

    def reorder(array: np.ndarray) -> np.ndarray:
        """Return an array [..., gates * hidden] with ONNX's gates, [1, gates * hidden, ...]."""
        return weights_lib.reorder_gates(array, order).T[None]

    constants = {
        "embedding": weights.embedding,
        "kernel": weights.kernel,
        "bias": weights.bias,
        "first": np.array([0]),
        "second": np.array([1]),
    }
    nodes = [
        make_node("Gather", ["embedding", "ids"], ["embedded"]),
        # [time, batch, features], as the operators have it.
        make_node("Transpose", ["embedded"], ["outputs"], perm=[1, 0, 2]),
    ]
    inputs = [describe("ids", numbers.INT64, ["batch", "time"])]
    outputs = [describe("logits", numbers.FLOAT, ["batch", "time", len(weights.bias)])]
    below = "outputs"
    for i, layer in enumerate(weights.layers):
        biases = [reorder(bias) for bias in weights_lib.split_biases(layer)]
        constants |= {
            f"input_kernel_{i}": reorder(layer["input_kernel"]),
            f"recurrent_kernel_{i}": reorder(layer["recurrent_kernel"]),
            f"biases_{i}": np.concatenate(biases, axis=1),
        }
        size = weights.hidden_sizes[i]
        before = [f"{state}_{i}" for state in states]
        nodes += [make_node("Unsqueeze", [name, "first"], [f"{name}_1"]) for name in before]
        kernels = [below, f"input_kernel_{i}", f"recurrent_kernel_{i}", f"biases_{i}", ""]
        after = [f"next_{name}" for name in before]
        results = [f"outputs_{i}_1", *(f"{name}_1" for name in after)]
        arguments = [*kernels, *(f"{name}_1" for name in before)]
        nodes.append(make_node(operator, arguments, results, hidden_size=size, **attributes))
        nodes += [make_node("Squeeze", [f"{name}_1", "first"], [name]) for name in after]
        above = f"outputs_{i}"
        nodes.append(make_node("Squeeze", [f"{above}_1", "second"], [above]))
        if weights.skip_connections and i:
            nodes.append(make_node("Add", [above, below], [f"sum_{i}"]))
            above = f"sum_{i}"
        below = above
        inputs += [describe(name, numbers.FLOAT, ["batch", size]) for name in before]
        outputs += [describe(name, numbers.FLOAT, ["batch", size]) for name in after]
    nodes += [
        make_node("Transpose", [below], ["hidden"], perm=[1, 0, 2]),
        make_node("MatMul", ["hidden", "kernel"], ["scores"]),
        make_node("Add", ["scores", "bias"], ["logits"]),
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "lstm_jax", inputs, outputs, tensors)
    opset = onnx.helper.make_opsetid("", _OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
