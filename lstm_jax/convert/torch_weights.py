"""Convert a model from and to a `state_dict` of PyTorch: an Embedding, an LSTM or GRU, a Linear.

`ops.weights` has the layouts of the recurrent layers. Files are safetensors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from lstm_jax import model as model_lib
from lstm_jax.data import files
from lstm_jax.errors import UserError, one_line
from lstm_jax.model import LanguageModel, Params
from lstm_jax.ops import weights
from lstm_jax.vocabulary import BYTES, PADDING, UNKNOWN, Vocabulary

StateDict = dict[str, np.ndarray]


def read_file(path: Path) -> StateDict:
    """Return the finite arrays of a safetensors file in float32, or raise `UserError`."""
    try:
        arrays = safetensors.numpy.load_file(files.check_file(path))
    except Exception as error:  # It raises many kinds for a damaged file.
        raise UserError(
            f"it is not a safetensors file ({one_line(error)[:200]}): write one with "
            "safetensors.torch.save_file(model.state_dict(), 'my.safetensors')"
        ) from None
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} has numbers that are not finite")
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def to_bytes(arrays: StateDict) -> bytes:
    """Return the content of a safetensors file with these arrays."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, {"format": "pt"})


def to_model(arrays: StateDict, modules: Sequence[str]) -> tuple[dict[str, object], Params]:
    """Return the `model` fields of a config, and the parameters.

    Biases may be missing. Embeddings are tied if the kernel of the dense layer is the embedding, or
    if only one of the two is there.

    Args:
      arrays: the `state_dict`.
      modules: the names of the Embedding, the LSTM or GRU, and the Linear.

    Raises:
      UserError: if an array is missing, has another shape, or is of another module.
    """
    arrays, (embedding, recurrent, linear) = dict(arrays), modules
    tables = [f"{embedding}.weight", f"{linear}.weight"]
    for name, other in (tables, tables[::-1]):
        if other in arrays:
            arrays.setdefault(name, arrays[other])

    hint = f"({', '.join(modules)} by --modules)"
    table, kernel = (arrays.get(name) for name in (tables[0], f"{recurrent}.weight_hh_l0"))
    if table is None or kernel is None or table.ndim != 2 or kernel.ndim != 2:
        raise UserError(f"it has no matrices {tables[0]} and {recurrent}.weight_hh_l0 {hint}")
    fields: dict[str, Any] = {
        "cell": "gru" if len(kernel) == 3 * kernel.shape[1] else "lstm",
        "embedding_size": table.shape[1],
        "hidden_size": kernel.shape[1],
        "num_layers": sum(name.startswith(f"{recurrent}.weight_hh_l") for name in arrays),
        "tie_embeddings": np.array_equal(table, arrays[tables[1]]),
    }
    model = LanguageModel(len(table), **fields)
    shapes = model_lib.get_param_shapes(model)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    expected = from_model(model, zeros, modules)
    biases = {name: array for name, array in expected.items() if array.ndim == 1}
    arrays = {**biases, **arrays}
    for name in sorted(expected.keys() | arrays.keys()):
        shape, target = (
            f"of shape {list(x[name].shape)}" if name in x else "missing"
            for x in (arrays, expected)
        )
        if shape != target:
            raise UserError(
                f"{name} is {shape}, and must be {target}: a model is an Embedding, an LSTM or GRU "
                f"in one direction, and a Linear {hint}"
            )

    params: Params = {"embedding": {"embedding": table}}
    for i in range(model.num_layers):
        layer = weights.from_torch(arrays, f"l{i}", f"{recurrent}.")
        params[f"{model.cell}_{i}"] = jax.tree.map(np.asarray, layer._asdict())
    params["dense"] = {"bias": arrays[f"{linear}.bias"]}
    if not model.tie_embeddings:
        params["dense"]["kernel"] = arrays[tables[1]].T
    return fields, params


def from_model(model: LanguageModel, params: Params, modules: Sequence[str] = ()) -> StateDict:
    """Return the `state_dict` of a model; raise `UserError` if PyTorch has no such layers.

    The names of the modules are by default `embedding`, `lstm` or `gru`, and `linear`.
    """
    has_one_size = len({*model.sizes[1:]}) == 1
    is_plain = has_one_size and not model.skip_connections
    if not (model.cell in ("lstm", "gru") and model.gating and is_plain):
        raise UserError(
            "PyTorch has only the cells lstm and gru, layers of one size, no blocks and no "
            "skip_connections"
        )
    embedding, recurrent, linear = modules or ("embedding", str(model.cell), "linear")
    own: Params = jax.tree.map(lambda array: np.asarray(array, np.float32), params)
    table = own["embedding"]["embedding"]
    arrays: StateDict = {f"{embedding}.weight": table}
    for i in range(model.num_layers):
        layer = model.gating.params(**own[f"{model.cell}_{i}"])
        arrays |= weights.to_torch(layer, f"l{i}", f"{recurrent}.")
    kernel = table if model.tie_embeddings else own["dense"]["kernel"].T
    return arrays | {f"{linear}.weight": kernel, f"{linear}.bias": own["dense"]["bias"]}


def add_special_rows(
    params: Params, tokens: Sequence[str], kind: str, stop: str
) -> tuple[Params, Vocabulary]:
    """Make "" and "[UNK]" rows 0 and 1; return parameters and vocabulary.

    Rows that the model lacks are added, with the mean embedding, and the mean of all logits minus
    30. `tokens` are those of its rows; they may also include "" and "[UNK]" if the model has
    neither. Raise `UserError` if the number of tokens does not fit the model.
    """
    table, dense = params["embedding"]["embedding"], params["dense"]
    proper = [token for token in tokens if token not in (PADDING, UNKNOWN)]
    rows = list(tokens) if len(tokens) == len(table) else proper
    if len(rows) != len(table):
        raise UserError(
            f"the model has {len(table)} tokens, but the vocabulary has {len(proper)} apart from "
            f"'' and {UNKNOWN!r}: name the vocabulary that it was trained with"
        )
    if kind in ("bytes", "bpe") and not {*BYTES} <= {*proper}:
        raise UserError("the vocabulary lacks bytes: those above 127 are U+DC80 to U+DCFF")
    try:
        vocabulary = Vocabulary([PADDING, UNKNOWN, *proper], kind, stop)
    except ValueError as error:
        raise UserError(f"the vocabulary can't be used: {error}") from None
    row_of = {token: row for row, token in enumerate(rows)}
    # The row after the last is the new one. With this bias it is, in effect, never drawn.
    indices = [row_of.get(token, len(rows)) for token in vocabulary.tokens]
    head = {"bias": np.append(dense["bias"], dense["bias"].mean() - 30)[indices]}
    if "kernel" in dense:
        kernel = dense["kernel"]
        head["kernel"] = np.append(kernel, kernel.mean(axis=1, keepdims=True), axis=1)[:, indices]
    embedding = np.append(table, table.mean(axis=0, keepdims=True), axis=0)[indices]
    return {**params, "embedding": {"embedding": embedding}, "dense": head}, vocabulary
