"""What a model has learnt, as one page: `python -m lstm_jax.inspect --workdir DIR --text FILE`.

After Karpathy, Johnson & Fei-Fei 2015, "Visualizing and Understanding Recurrent Networks". The
page, `report.html` with its data put in, needs nothing but a browser.
"""

if __name__ == "__main__":
    from lstm_jax import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import base64
import gzip
import json
import math
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lstm_jax import activations, command, corpus, features, files, metrics, texts, workdir
from lstm_jax.activations import Reading
from lstm_jax.errors import UserError
from lstm_jax.features import Follower
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


def main() -> None:
    """Writes the page."""
    values = flags.FLAGS
    if values.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    directory = Path(values.workdir)
    out = Path(values.out) if values.out else directory / REPORT
    _check_out(out, given=bool(values.out))
    trained = workdir.load(directory)
    any_bytes = trained.vocabulary.kind == "bytes"
    if values.text:
        text = corpus.read_argument(values.text, "--text", any_bytes)
        name = "standard input" if values.text == "-" else Path(values.text).name
    else:
        splits = texts.read_again(
            trained.config.data, values.data_path, values.dataset, values.data_directory
        )
        text = next(splits["validation"].pieces(0))
        name = "the validation split"
    units = trained.vocabulary.split(text)
    if len(units) < 2:
        raise UserError(f"{name} is too short: --text must name a file of two units or more")
    if len(units) > values.length:
        print(
            f"reading the first {values.length:,} of {len(units):,} {trained.vocabulary.kind} "
            "(--length)",
            file=sys.stderr,
        )
        text = "".join(units[: values.length])
        if any_bytes:  # A character may have been cut.
            raw = text.encode("utf-8", "surrogateescape")
            text = raw.decode("utf-8", "surrogateescape")
    page = make(trained, text, name, directory)
    try:
        files.write(out, page)
    except OSError as error:
        raise UserError(f"can't write {out} (--out): {error.strerror}") from None
    print(f"{out} ({len(page) / 1e6:.1f} MB): open it in a browser")


def make(trained: workdir.Trained, text: str, name: str, directory: Path) -> bytes:
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
    reading = activations.read(model, trained.params, ids)
    if not np.isfinite(reading.bits).all():
        raise UserError(
            f"what the model of step {trained.step} predicts is no number: its training has "
            "diverged, train it anew with a lower optimizer.learning_rate"
        )
    present = features.present(features.of_units(text, vocabulary))
    matrix = np.stack(list(present.values())) if present else np.zeros((0, len(ids)), np.float32)
    followers, correlations = features.followers(reading.activations, matrix, _CELLS_EACH)
    data = {
        "workdir": directory.resolve().name,
        "model": _describe(trained),
        "text": name,
        "unit": vocabulary.unit_name,
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
        "curves": _curves(metrics.read(directory / workdir.METRICS)),
        "samples": _samples(directory / workdir.SAMPLES),
    }
    # In ASCII, and without "<", JSON can stand in a script whatever the text holds.
    in_script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = resources.files("lstm_jax").joinpath(REPORT).read_text(encoding="utf-8")
    before, after = template.split(_PLACE)
    return (before + in_script + after).encode()


def _check_out(out: Path, given: bool) -> None:
    """A page that could not be written is refused before the model reads."""
    if out.is_dir():
        raise UserError(f"{out} is a directory: --out must name a file, such as {out / REPORT}")
    # Without --out the page goes to the working directory; if that is missing, loading tells so.
    if given and not out.parent.is_dir():
        raise UserError(f"there is no directory {out.parent}: make it, or name another --out")


def _describe(trained: workdir.Trained) -> str:
    model = trained.model
    layers = "1 layer" if model.num_layers == 1 else f"{model.num_layers} layers"
    sizes = " and ".join(str(size) for size in dict.fromkeys(model.sizes[1:]))
    return f"{model.cell}, {layers} of {sizes} cells, step {trained.step:,}"


def _tokens(vocabulary: Vocabulary, text: str, ids: np.ndarray, reading: Reading) -> dict[str, Any]:
    """The text, what it cost and what was expected, as numbers in a table of units."""
    table = [_visible(unit) for unit in vocabulary.units]
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
    for split in corpus.SPLITS:
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


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Working directory of a training run.")
    flags.DEFINE_string("text", None, "The text to read; the run's validation split by default.")
    flags.DEFINE_string("out", None, f"The page; {REPORT} in the working directory by default.")
    flags.DEFINE_integer(
        "length",
        100_000,
        "How many characters, words or bytes to read at most; it takes as many bytes of memory for "
        "each cell.",
        lower_bound=2,
        upper_bound=10**6,
    )
    command.define_text_flags()
    command.run(main)
