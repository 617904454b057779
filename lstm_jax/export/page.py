"""Write a page that contains a trained model and runs it in the browser.

The page is `page.html` with the model filled in. It loads nothing from elsewhere.
"""

import base64
from pathlib import Path

import jax
import numpy as np

from lstm_jax import bpe
from lstm_jax.errors import UserError
from lstm_jax.run import pages, workdir

# The cells that the page implements.
CELLS = ("lstm", "gru", "rnn")


def write_page(directory: Path, target: Path, bits: int = 16) -> None:
    """Write the page of the model in a working directory, or raise `UserError`; print its path."""
    if target.suffix != ".html":
        raise UserError(f"{target} (--to) is not the name of a page: it must end in .html")
    model = workdir.load_config(workdir.find_model(directory)).model
    if model.cell not in CELLS or model.block != "none":
        named = model.cell if model.block == "none" else f"model.block={model.block}"
        raise UserError(f"a page can run the cells {', '.join(CELLS)}, not {named}")
    trained = workdir.load_trained(directory)
    page = make_page(trained, directory.resolve().name, bits)
    pages.write_page(target, "--to", page)
    if (dtype := trained.model.dtype) != "float32":
        print(f"In Python its matmuls use {dtype}, but the page computes in float32")


def make_page(trained: workdir.Trained, name: str, bits: int) -> bytes:
    """Return the page of a model called `name`, with 8 or 16 bits for each weight.

    Its cell must be one of `CELLS`, without blocks.
    """
    model, vocabulary = trained.model, trained.vocabulary

    def pack(array: jax.Array) -> dict[str, object]:
        """Return a kernel with its outputs as rows, or a vector."""
        if array.ndim == 1:
            return pack_floats(np.asarray(array))
        return pack_rows(np.asarray(array.T, order="C"), bits)

    layers = [trained.params[f"{model.cell}_{i}"] for i in range(model.num_layers)]
    data = {
        "name": name,
        "parameters": sum(array.size for array in jax.tree.leaves(trained.params)),
        "cell": model.cell,
        "skipConnections": model.skip_connections,
        "tokens": vocabulary.tokens,
        "kind": vocabulary.kind,
        "words": bpe.WORDS.pattern,  # What `bpe` divides into tokens.
        "tokenName": vocabulary.token_name,
        "stop": vocabulary.stop,
        # A row for each token, as in the kernel of the dense layer.
        "embedding": pack(trained.params["embedding"]["embedding"].T),
        "layers": jax.tree.map(pack, layers),
        "dense": jax.tree.map(pack, trained.params["dense"]),
    }
    return pages.fill_page("lstm_jax.export", "page.html", data)


def pack_rows(matrix: np.ndarray, bits: int) -> dict[str, object]:
    """Return a matrix as integers with a scale for each row, as the page reads it."""
    limit = 2 ** (bits - 1) - 1
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest, 1) / np.float32(limit)
    integers = np.round(matrix / scales).astype(f"<i{bits // 8}")
    return {"bits": bits, "values": _encode(integers), "scales": pack_floats(scales[:, 0])}


def pack_floats(vector: np.ndarray) -> dict[str, object]:
    """Return a vector as float32, as the page reads it."""
    return {"bits": 32, "values": _encode(vector.astype("<f4"))}


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
