"""What a model has learnt, as one page: `python -m lstm_jax.inspect --workdir DIR --text FILE`.

After Karpathy, Johnson & Fei-Fei 2015, "Visualizing and Understanding Recurrent Networks". The
page, `report.html` with its data put in, needs nothing but a browser.
"""

import base64
import gzip
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lstm_jax.data import sources
from lstm_jax.errors import UserError
from lstm_jax.inspect import activations, features
from lstm_jax.inspect.activations import Reading
from lstm_jax.inspect.features import Follower
from lstm_jax.run import files, metrics, workdir
from lstm_jax.vocabulary import (
    FILE_END,
    PADDING_ID,
    UNKNOWN_ID,
    Vocabulary,
    escape_controls,
)

REPORT = "report.html"

# Activations that a page holds, a byte each before they are compressed: half of them are those of
# the cells that follow a feature, over the whole text; half those of all cells, over its beginning.
_BUDGET = 16_000_000
# For each feature so many cells are looked at.
_CELLS_EACH = 3
# Points of a learning curve.
_POINTS = 400
# Characters of samples, the last ones.
_SAMPLES = 200_000
# Where the data stand in the template.
_PLACE = "null/*data*/"


def make_page(trained: workdir.Trained, text: str, name: str, directory: Path) -> bytes:
    """The page for a text of two units or more.

    Args:
      trained: the model.
      text: what it reads.
      name: what to call the text.
      directory: the working directory, for its metrics and samples.

    Raises:
      UserError: if the model's predictions are no numbers.
    """
    model, vocabulary = trained.model, trained.vocabulary
    ids = vocabulary.encode(text)
    reading = activations.record_activations(model, trained.params, ids)
    if not np.isfinite(reading.bits).all():
        raise UserError(
            f"what the model of step {trained.step} predicts is no number: its training has "
            "diverged, train it anew with a lower optimizer.learning_rate"
        )
    present = features.select_present(features.compute_features(text, vocabulary))
    matrix = np.stack(list(present.values())) if present else np.zeros((0, len(ids)), np.float32)
    followers, correlations = features.find_followers(reading.activations, matrix, _CELLS_EACH)
    data = {
        "workdir": directory.resolve().name,
        "model": _describe(trained),
        "text": name,
        "unit": vocabulary.token_name,
        **_tokens(vocabulary, text, ids, reading),
        **_cells(reading.activations, _in_order(followers)),
        "layers": list(model.sizes[1:]),
        "cell": model.cell,
        "features": list(present),
        "followers": [[follower._asdict() for follower in row] for row in followers],
        "correlations": _packed(np.round(correlations * 1000), np.int16),
        "saturation": [
            {gate: _packed(np.round(shares * 1000), np.uint16) for gate, shares in layer.items()}
            for layer in reading.saturation
        ],
        "curves": _curves(metrics.read_metrics(directory / workdir.METRICS)),
        "samples": _samples(directory / workdir.SAMPLES),
    }
    # In ASCII, and without "<", JSON can stand in a script whatever the text holds.
    in_script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = resources.files("lstm_jax.inspect").joinpath(REPORT).read_text(encoding="utf-8")
    before, after = template.split(_PLACE)
    return (before + in_script + after).encode()


def _describe(trained: workdir.Trained) -> str:
    model = trained.model
    layers = "1 layer" if model.num_layers == 1 else f"{model.num_layers} layers"
    sizes = " and ".join(str(size) for size in dict.fromkeys(model.sizes[1:]))
    return f"{model.cell}, {layers} of {sizes} cells, step {trained.step:,}"


def _tokens(vocabulary: Vocabulary, text: str, ids: np.ndarray, reading: Reading) -> dict[str, Any]:
    """The text, what it cost and what was expected, as numbers in a table of units."""
    table = [_visible(unit) for unit in vocabulary.tokens]
    tokens = ids.copy()
    # Units that are [UNK] to the model are shown as they are, after those that it knows.
    units = vocabulary.split(text)
    unknown = np.flatnonzero(ids == UNKNOWN_ID)
    numbers = {unit: len(table) + k for k, unit in enumerate(vocabulary.unknown(text))}
    tokens[unknown] = [numbers[units[position]] for position in unknown]
    table += map(_visible, numbers)
    shown = tokens
    if vocabulary.kind == "bytes":
        shown, characters = _characters(tokens, text, vocabulary.stop, len(table))
        table += map(_visible, characters)
    small = np.min_scalar_type(len(table))
    return {
        "table": table,
        "known": len(vocabulary),
        "tokens": _packed(tokens, small),
        "shown": _packed(shown, small),
        "guesses": _packed(reading.guesses, small),
        "probabilities": _packed(np.round(255 * reading.probabilities), np.uint8),
        "bits": _packed(np.minimum(np.round(1000 * reading.bits), 65535), np.uint16),
    }


def _characters(
    tokens: np.ndarray, text: str, stop: str, first: int
) -> tuple[np.ndarray, list[str]]:
    """Return what a reader sees of each byte of a text, and the characters of several bytes.

    The first byte of such a character shows it, as number `first` or above; the others show "".
    """
    shown, numbers, at = tokens.copy(), dict[str, int](), 0
    for number, part in enumerate(text.split(stop) if stop else [text]):
        at += number > 0  # The stop token.
        for character in part:
            size = len(character.encode("utf-8", "surrogateescape"))
            if size > 1:
                shown[at] = numbers.setdefault(character, first + len(numbers))
                shown[at + 1 : at + size] = PADDING_ID
            at += size
    return shown, list(numbers)


def _visible(unit: str) -> str:
    """A unit as the page can show it: escapes for bytes that are no ASCII, and for controls."""
    unit = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:x}", unit)
    unit = unit if unit == "\r" else escape_controls(unit)  # Of a line break in two units.
    return unit.replace(FILE_END, "\N{SYMBOL FOR END OF TRANSMISSION}\n")


def _in_order(followers: Sequence[Sequence[Follower]]) -> list[int]:
    """The cells that follow a feature, those first that follow one best."""
    best = sorted((f for row in followers for f in row), key=lambda f: -abs(f.searched))
    return list(dict.fromkeys(follower.cell for follower in best))


def _cells(values: np.ndarray, cells: Sequence[int]) -> dict[str, Any]:
    """As many of the activations [cells, n] as a page can hold, `cells` before others."""
    number, n = values.shape
    beginning = n if values.size <= _BUDGET else max(_BUDGET // 2 // number, 1)
    whole = [] if beginning == n else list(cells[: _BUDGET // 2 // n])
    return {
        "beginning": min(beginning, n),
        "beginning_values": _packed(values[:, :beginning], np.int8),
        "whole": whole,
        "whole_values": _packed(values[whole], np.int8),
    }


def _packed(values: np.ndarray, dtype: Any) -> dict[str, str]:
    """An array of integers as the page reads it: little-endian, compressed, in base64."""
    kind = np.dtype(dtype)
    raw = np.ascontiguousarray(values, kind.newbyteorder("<")).tobytes()
    content = base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")
    name = f"{'Uint' if kind.kind == 'u' else 'Int'}{8 * kind.itemsize}Array"
    return {"type": name, "base64": content}


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses of each split; of a long curve, the means of stretches of it."""
    curves = {}
    for split in sources.SPLITS:
        points = [
            (row["step"], row["loss"])
            for row in rows
            if row["split"] == split and math.isfinite(row["loss"])
        ]
        stretch = max(1, math.ceil(len(points) / _POINTS))
        stretches = [points[k : k + stretch] for k in range(0, len(points), stretch)]
        curves[split] = [
            (part[-1][0], sum(loss for _, loss in part) / len(part)) for part in stretches
        ]
    return curves


def _samples(path: Path) -> list[dict[str, str]]:
    """What the run wrote while it was trained, by the line that heads each text."""
    try:
        content = files.read_tail(path, 8 * _SAMPLES).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    parts = re.split(r"^=== (step \d+, temperature .*)\n", content, flags=re.MULTILINE)[1:]
    samples = [
        {"title": title, "text": text.rstrip("\n")}
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    kept = _SAMPLES
    for first in reversed(range(len(samples))):
        kept -= len(samples[first]["text"])
        if kept < 0:
            return samples[first + 1 :]
    return samples
