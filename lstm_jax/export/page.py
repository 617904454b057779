"""Write a page about a trained model: its predictions, and what its hidden units follow in a text.

The page is `page.html` with its data filled in. It loads nothing from elsewhere. A model whose cell
is one of `CELLS` runs in it, and reads and generates text there; of any other model, the page
contains a record of the start of the text.
"""

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import bpe
from lstm_jax.data import files, texts
from lstm_jax.errors import UserError, name_failure, note
from lstm_jax.export import features
from lstm_jax.loss import Chunk, iterate_chunks, read_chunks
from lstm_jax.model import Carry, LanguageModel, Params
from lstm_jax.run import workdir
from lstm_jax.run.run import Run, load
from lstm_jax.vocabulary import UNKNOWN_ID, Vocabulary

# The cells that the page implements.
CELLS = ("lstm", "gru", "rnn")

_LENGTH = 100_000  # Characters that are read in Python: a byte of memory each per hidden unit.
_EXCERPT = 300  # Characters of the text that a model reads in the page at first.
_RECORDED = 5000  # Tokens of the record of a text, and the number of its activations, at most.
_RECORDED_ACTIVATIONS = 4_000_000
_FOLLOWERS = 3  # Of each feature, at most.
_CHUNK = 1024  # Tokens for one compiled call.
_SCALE = 127  # Activations are stored as int8, in steps of 1 / _SCALE.
_GUESSES = 5  # The most probable tokens that are recorded.


class Reading(NamedTuple):
    """A record of a model that read a text of n tokens from start to end."""

    # int8 [n, hidden units], in 1/127: the activation of each hidden unit after each token, as
    # `cells.base.get_activation` defines it; layer by layer.
    activations: np.ndarray
    # int32 [n, at most `_GUESSES`]: the most probable tokens after each token, in this order:
    # guesses[t] predict token t + 1.
    guesses: np.ndarray
    probabilities: np.ndarray  # Their probabilities, float32 of the same shape.
    # float32 [n]: bits[t] is the loss of token t itself, given all before it; 0 for the first.
    bits: np.ndarray


def read_text(directory: Path, text_file: str | None, own_text: str | None) -> str:
    """Return the first characters of a text for the model in a working directory.

    It is that of `text_file` ("-" is standard input), or else the run's validation split, whose
    text is now at the path `own_text`, or None.
    """
    data = workdir.load_config(workdir.find_model(directory)).data
    if text_file:
        return texts.read_argument(text_file, "--text", data.units).read()[:_LENGTH]
    return texts.load_texts_of_run(data, own_text)["validation"].read()[:_LENGTH]


def write_page(directory: Path, text: str, target: Path | None = None) -> None:
    """Write the page of the model in a working directory, or raise `UserError`; log its path."""
    if target is None:  # Nothing is written into the package.
        is_here = workdir.find_model(directory) == directory
        target = Path(directory if is_here else ".") / "page.html"
    run = load(directory)
    note(f"The model of {directory}, step {run.step}, reads {len(text):,} characters")
    page = make_page(run, directory.resolve().name, text)
    with name_failure(f"can't write {target} (--to)"):
        files.write_file(target, page)
    note(f"Wrote {target} ({len(page) / 1e6:.1f} MB): open it in a browser")


def make_page(run: Run, name: str, text: str) -> bytes:
    """Return the page of a model called `name` that has read a text.

    Raise `UserError` if the text is shorter than two tokens, or predictions are not finite.
    """
    model, vocabulary = run.model, run.vocabulary
    ids = vocabulary.encode(text)
    if len(ids) < 2:
        raise UserError("the text is too short: --text must name a file of two tokens or more")
    reading = record_activations(model, run.params, ids)
    if not np.isfinite(reading.bits).all():
        raise UserError(
            f"the predictions of the model of step {run.step} are not finite: its training "
            "diverged; train again with a lower --config.optimizer.learning_rate"
        )
    series = features.compute_features(text, vocabulary)
    matrix = np.stack([*series.values()])
    followers, correlations = features.find_followers(reading.activations.T, matrix, _FOLLOWERS)
    runs_in_page = model.cell in CELLS and model.block == "none"
    data = {
        "name": name,
        "cell": model.cell_name if model.block == "none" else f"{model.cell_name} in blocks",
        "sizes": model.sizes[1:],
        "parameters": sum(array.size for array in jax.tree.leaves(run.params)),
        "tokens": vocabulary.tokens,
        "kind": vocabulary.kind,
        "tokenName": vocabulary.token_name,
        "stop": vocabulary.stop,
        "lineBreak": "\r\n" if "\r\n" in text else "\n",
        "features": list(series),
        "followers": followers,
        "correlations": pack(correlations, "f4"),
        "model": pack_model(run) if runs_in_page else None,
        "text": text[:_EXCERPT],
        "record": None if runs_in_page else _pack_record(vocabulary, text, ids, reading),
    }
    template = resources.files("lstm_jax.export").joinpath("page.html").read_text("utf-8")
    # ASCII without "<" is safe in a script.
    in_script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return template.replace("null/*data*/", in_script).encode()


def record_activations(model: LanguageModel, params: Params, ids: np.ndarray) -> Reading:
    """Read a text, int32 [n], with one carry from start to end, and record the model.

    This needs three bytes of memory per hidden unit and token.
    """
    # An extra token makes the last one an input, too. Its loss is dropped below.
    chunks = iterate_chunks(np.append(ids, 0), _CHUNK)
    reading = Reading(*read_chunks(_read, model, params, chunks))
    return reading._replace(bits=np.append(np.float32(0), reading.bits[:-1]))


@jax.jit(static_argnames="model")
def _read(
    model: LanguageModel, params: Params, chunk: Chunk, carry: Carry
) -> tuple[tuple[jax.Array, ...], Carry]:
    """Read a chunk; return the carry, and before it the arrays of a `Reading`, [1, time, ...].

    At t, the bits are those of the target.
    """
    inputs, targets, _ = chunk
    bound = model.bind({"params": params})

    def step(carry: Carry, ids: jax.Array) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        outputs, carry, records = bound.run_step(ids, carry)
        return carry, (outputs, jnp.concatenate([activation for activation, _ in records], axis=1))

    carry, steps = jax.lax.scan(step, carry, inputs.T)
    outputs, activations = (x.swapaxes(0, 1) for x in steps)
    logits = bound.predict(outputs)
    number = min(_GUESSES, model.vocabulary_size)
    probabilities, guesses = jax.lax.top_k(jax.nn.softmax(logits), number)
    bits = optax.softmax_cross_entropy_with_integer_labels(logits, targets) / jnp.log(2.0)
    quantized = jnp.round(_SCALE * jnp.clip(activations, -1, 1)).astype(jnp.int8)
    return (quantized, guesses, probabilities, bits), carry


def pack_model(run: Run) -> dict[str, Any]:
    """Return a model with a cell of `CELLS` and no blocks, as the page reads it."""
    model, params = run.model, run.params
    layers = [params[f"{model.cell}_{i}"] for i in range(model.num_layers)]
    return {
        "skipConnections": model.skip_connections,
        "words": bpe.WORDS.pattern,  # What `bpe` divides into tokens.
        # A row for each token, as in the kernel of the dense layer.
        "embedding": pack_param(params["embedding"]["embedding"].T),
        "layers": jax.tree.map(pack_param, layers),
        "dense": jax.tree.map(pack_param, params["dense"]),
    }


def _pack_record(
    vocabulary: Vocabulary, text: str, ids: np.ndarray, reading: Reading
) -> dict[str, Any]:
    """Return the first tokens of a text, with the activations and predictions after each."""
    n = min(_RECORDED, max(_RECORDED_ACTIVATIONS // reading.activations.shape[1], 1))
    ids, tokens = ids[:n], vocabulary.split(text)[:n]
    return {
        "ids": pack(ids, "i4"),
        "unknown": [tokens[position] for position in np.flatnonzero(ids == UNKNOWN_ID)],
        "activations": pack(reading.activations[:n], "i1"),
        "bits": pack(reading.bits[:n], "f4"),
        "guesses": pack(reading.guesses[:n], "i4"),
        "probabilities": pack(reading.probabilities[:n], "f4"),
    }


def pack_param(array: jax.Array) -> dict[str, Any]:
    """Return a kernel as integers of 16 bits, its outputs as rows with a scale each; or a bias."""
    if array.ndim == 1:
        return pack(array)
    rows = np.asarray(array.T)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest, 1) / np.float32(2**15 - 1)
    return {**pack(np.round(rows / scales), "i2"), "scales": pack(scales[:, 0])}


def pack(array: np.typing.ArrayLike, dtype: str = "f4") -> dict[str, Any]:
    """Return an array as the page reads it: little-endian, in base64."""
    raw = np.asarray(array, f"<{dtype}").tobytes()
    return {"dtype": dtype, "values": base64.b64encode(raw).decode("ascii")}
