"""Write a page about the activations of a model while it reads a text.

The page is `report.html` with its data filled in. It loads nothing from elsewhere.
"""

import base64
import gzip
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lstm_jax.cells.base import Cell
from lstm_jax.cells.lstm import LSTMCell
from lstm_jax.data import files, sources, texts
from lstm_jax.errors import UserError, name_failure
from lstm_jax.inspect import activations, features
from lstm_jax.run import metrics, pages, workdir
from lstm_jax.run.console import escape_controls
from lstm_jax.vocabulary import FILE_END, MAX_TOKEN_LENGTH, PADDING_ID, UNKNOWN_ID, Vocabulary

REPORT = "report.html"

# The number of activations in a page, one byte each before compression: one half for the hidden
# units that follow a feature, over the whole text; the other for all hidden units, over its start.
_BUDGET = 16_000_000
_MAX_FOLLOWERS = 3  # Of each feature.
_MAX_CURVE_POINTS = 400
_MAX_SAMPLES = 200_000  # In bytes. The last ones are kept.


def write_report(
    directory: Path, text_file: str | None, *own_text: str | None, out: Path | None, length: int
) -> None:
    """Write the page about the model in a working directory, or raise `UserError`; print its path.

    The text is that of `text_file` ("-" is standard input), or else the run's validation split,
    for which `own_text` are arguments of `texts.load_texts_of_run`. Its first `length` tokens
    are read.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"there is no directory {out.parent}: make it, or use another --out")
    if out is None:  # Nothing is written into the package.
        out = Path(REPORT) if workdir.is_in_package(directory) else directory / REPORT
    if out.is_dir():
        raise UserError(f"{out} is a directory: --out must name a file, such as {out / REPORT}")
    trained = workdir.load_trained(directory)
    vocabulary = trained.vocabulary
    if text_file:
        text = sources.read_argument(text_file, "--text", vocabulary.kind == "bytes")
        name = "standard input" if text_file == "-" else Path(text_file).name
    else:
        splits = texts.load_texts_of_run(trained.config.data, *own_text)
        # The start of a prepared text has more tokens than --length may be.
        text, name = splits["validation"].read_start(), "the validation split"
    tokens = vocabulary.split(text[: (length + 1) * MAX_TOKEN_LENGTH])
    if len(tokens) < 2:
        raise UserError(f"{name} is too short: --text must name a file of two tokens or more")
    if len(tokens) > length:
        print(f"reading the first {length:,} {vocabulary.token_name}s (--length)", file=sys.stderr)
        # The last character may be incomplete.
        spelled = "".join(tokens[:length]).encode("utf-8", "surrogateescape")
        text = spelled.decode("utf-8", "surrogateescape")
    page = make_page(trained, text, name, directory)
    pages.write_page(out, "--out", page)


def make_page(trained: workdir.Trained, text: str, name: str, directory: Path) -> bytes:
    """Return the page about a model that reads a text of two tokens or more, called `name`.

    Raise `UserError` if the model's predictions are not finite.
    """
    model, vocabulary = trained.model, trained.vocabulary
    layers = f"{model.num_layers} layer{'s' * (model.num_layers > 1)}"
    sizes = " and ".join(str(size) for size in dict.fromkeys(model.sizes[1:]))
    ids = vocabulary.encode(text)
    reading = activations.record_activations(model, trained.params, ids)
    if not np.isfinite(reading.bits).all():
        raise UserError(
            f"the predictions of the model of step {trained.step} are not finite: its training "
            "diverged; train again with a lower optimizer.learning_rate"
        )
    present = features.select_present(features.compute_features(text, vocabulary))
    matrix = np.stack(list(present.values())) if present else np.zeros((0, len(ids)), np.float32)
    followers, correlations = features.find_followers(reading.activations, matrix, _MAX_FOLLOWERS)
    data = {
        "workdir": directory.resolve().name,
        "model": f"{model.cell_name}, {layers} of {sizes} hidden units, step {trained.step:,}",
        "text": name,
        "token_name": vocabulary.token_name,
        **_pack_tokens(vocabulary, text, ids, reading),
        **_pack_activations(reading.activations, followers),
        "layers": list(model.sizes[1:]),
        "activation": _describe_activation(type(model.make_cells()[0])),
        "features": list(present),
        "followers": [[follower._asdict() for follower in row] for row in followers],
        "correlations": _pack(np.round(correlations * 1000), np.int16),
        "saturation": [
            {gate: _pack(np.round(shares * 1000), np.uint16) for gate, shares in layer.items()}
            for layer in reading.saturation
        ],
        "curves": _make_curves(metrics.read_metrics(directory / workdir.METRICS)),
        "samples": _read_samples(directory / workdir.SAMPLES),
    }
    return pages.fill_page("lstm_jax.inspect", REPORT, data)


def _describe_activation(cell: type) -> str:
    """Return the name of the values that `protocol.get_activation` returns for a cell."""
    names: dict[object, str] = {
        LSTMCell.activation: "tanh of the cell state",
        Cell.activation: "the hidden state",
        None: "tanh of the outputs",
    }
    return names.get(getattr(cell, "activation", None), "as its cell defines it")


def _pack_tokens(
    vocabulary: Vocabulary, text: str, ids: np.ndarray, reading: activations.Reading
) -> dict[str, object]:
    """Return the text and the predictions, as indices into a table of tokens."""
    added: dict[str, int] = {}  # Texts that follow the vocabulary in the table.

    def add(text: str) -> int:
        return added.setdefault(text, len(vocabulary) + len(added))

    split, tokens = vocabulary.split(text), ids.copy()
    for position in np.flatnonzero(ids == UNKNOWN_ID):  # Unknown tokens are shown as they are.
        tokens[position] = add(split[position])
    # A token that begins or ends within a character shows the characters whose first bytes it has.
    shown, ends = tokens.copy(), np.cumsum(np.append(0, features.count_bytes(split)))
    starts = np.cumsum(np.append(0, features.count_bytes(text)))
    characters = np.searchsorted(starts, ends)
    is_within = starts[characters] != ends
    for position in np.flatnonzero(is_within[:-1] | is_within[1:]):
        part = text[characters[position] : characters[position + 1]]
        shown[position] = add(part) if part else PADDING_ID
    table = [_make_visible(text) for text in (*vocabulary.tokens, *added)]
    dtype = np.min_scalar_type(len(table))
    return {
        "table": table,
        "known": len(vocabulary),
        "tokens": _pack(tokens, dtype),
        "shown": _pack(shown, dtype),
        "guesses": _pack(reading.guesses, dtype),
        "probabilities": _pack(np.round(255 * reading.probabilities), np.uint8),
        "bits": _pack(np.minimum(np.round(1000 * reading.bits), 65535), np.uint16),
    }


def _make_visible(token: str) -> str:
    """Replace bytes that are not ASCII, and control characters, by escapes."""
    token = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:x}", token)
    token = token if token == "\r" else escape_controls(token)  # "\r" may begin a line break.
    return token.replace(FILE_END, "\N{SYMBOL FOR END OF TRANSMISSION}\n")


def _pack_activations(
    values: np.ndarray, followers: Sequence[Sequence[features.Follower]]
) -> dict[str, Any]:
    """Return activations [hidden_units, n] within the budget, those of the best followers first."""
    number, n = values.shape
    beginning = n if values.size <= _BUDGET else max(_BUDGET // 2 // number, 1)
    best = sorted((f for row in followers for f in row), key=lambda f: -abs(f.searched))
    units = list(dict.fromkeys(follower.hidden_unit for follower in best))
    whole = [] if beginning == n else units[: _BUDGET // 2 // n]
    return {
        "beginning": beginning,
        "beginning_values": _pack(values[:, :beginning], np.int8),
        "whole": whole,
        "whole_values": _pack(values[whole], np.int8),
    }


def _pack(values: np.ndarray, dtype: np.typing.DTypeLike) -> dict[str, str]:
    """Return integers as the page reads them: little-endian, compressed, in base64."""
    kind = np.dtype(dtype)
    raw = np.asarray(values, kind.newbyteorder("<")).tobytes()
    content = base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")
    name = f"{'Uint' if kind.kind == 'u' else 'Int'}{8 * kind.itemsize}Array"
    return {"type": name, "base64": content}


def _make_curves(rows: Sequence[metrics.Row]) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and losses of each split, averaged over intervals of a long curve.

    The loss before training, which would determine the range, is left out.
    """
    curves = {}
    trained = [row for row in rows if row["step"] and math.isfinite(row["loss"])]
    for split in sources.SPLITS:
        of_split = [row for row in trained if row["split"] == split]
        interval = max(1, math.ceil(len(of_split) / _MAX_CURVE_POINTS))
        intervals = [of_split[k : k + interval] for k in range(0, len(of_split), interval)]
        curves[split] = [
            (part[-1]["step"], sum(row["loss"] for row in part) / len(part)) for part in intervals
        ]
    return curves


def _read_samples(path: Path) -> list[dict[str, str]]:
    """Return the samples that the run generated during training, by their titles."""
    with name_failure(f"can't read {path}"):
        content = files.read_tail(path, _MAX_SAMPLES).decode("utf-8", "replace")
    parts = re.split(r"^=== (step \d+, temperature .*)\n", content, flags=re.MULTILINE)[1:]
    return [
        {"title": title, "text": text.rstrip("\n")}
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    ]
