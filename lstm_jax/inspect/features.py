"""What a reader sees in a text, such as the position in the line, and which cells follow it.

Every feature is a number for each character, found from the text alone. A cell follows a feature as
far as the two are correlated. Among a thousand cells some are correlated with anything, by chance,
so cells are chosen on the first half of a text and judged on the second.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lstm_jax.vocabulary import Vocabulary

# A feature must set so many positions of each half apart from the rest.
_LEAST = 10
# A speaker's name, on a line of its own that ends in a colon, is no longer.
_LONGEST_NAME = 40
# Cells correlated at a time, which bounds the memory for them as float32.
_BLOCK = 128


class Follower(NamedTuple):
    """A cell that follows a feature.

    Attributes:
      feature: which.
      cell: which.
      searched: their correlation in the first half of the text, by which the cell was chosen.
      correlation: the same in the second half.
      chance: 99 % of the correlations in the second half are nearer to zero than this once the
        feature is shifted against the text, by any distance.
    """

    feature: int
    cell: int
    searched: float
    correlation: float
    chance: float


def compute_features(text: str, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """`compute_text_features` for each unit of a text: of its last character, float32 [n]."""
    sizes = [len(unit.encode("utf-8", "surrogateescape")) for unit in vocabulary.split(text)]
    # The last byte of each unit, and the character that each byte is of, whatever units are.
    last_bytes = np.cumsum(sizes, dtype=np.int64) - 1
    bytes_each = [len(character.encode("utf-8", "surrogateescape")) for character in text]
    characters = np.repeat(np.arange(len(text)), bytes_each)[last_bytes]
    return {name: values[characters] for name, values in compute_text_features(text).items()}


def compute_text_features(text: str) -> dict[str, np.ndarray]:
    """The features of each character of a text, by name: float32 [n].

    What is true or not is 1 or 0. All are of the text up to and with the character, but for
    "characters left in the line" and the names of speakers, which the colon after them shows.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    index = np.arange(len(codes))
    space, alphanumeric = _where(codes, str.isspace), _where(codes, str.isalnum)
    upper, newline = _where(codes, str.isupper), codes == ord("\n")

    # Lines, each with the newline that ends it.
    line = np.cumsum(newline) - newline
    first = np.flatnonzero(np.append(True, newline[:-1]))
    end = np.append(first[1:], len(codes)) - 1  # A last line without a newline ends at its end.
    dark = np.flatnonzero(~space)  # What leaves ink.
    last_dark, first_dark = np.full(len(first), -1), np.full(len(first), -1)
    last_dark[line[dark]] = dark
    first_dark[line[dark[::-1]]] = dark[::-1]
    blank = last_dark < 0
    starts_paragraph = ~blank & np.append(True, blank[:-1])
    paragraph_line = np.maximum.accumulate(np.where(starts_paragraph, np.arange(len(first)), 0))
    paragraph_start = first[paragraph_line][line]

    # Speakers, as plays name them: a short line that begins a paragraph and ends in a colon.
    short = last_dark - first < _LONGEST_NAME
    names = starts_paragraph & short & (codes[last_dark] == ord(":")) & ~blank
    has_name = names[paragraph_line]
    in_name = names[line] & (index < last_dark[line])
    line_number = np.where(blank, 0, np.arange(len(first)) - paragraph_line + ~has_name)

    word_start = _last(~alphanumeric, index) + 1
    sentence_end = _last(np.isin(codes, _codes(".!?")), index)
    # After „ it closes.
    opens, closes = ("„«", "“”»") if ord("„") in codes else ("“«", "”»")
    inside_quotes = _depth(codes, opens, closes, paragraph_start)
    inside_quotes += _odd(codes, '"', paragraph_start)
    booleans = {
        "inside quotation marks": inside_quotes > 0,
        "inside brackets ( ) [ ]": _depth(codes, "([", ")]", paragraph_start) > 0,
        "inside a tag < >": _depth(codes, "<", ">", first[line]) > 0,
        "inside a speaker's name": in_name,
        "the line after a speaker's name": (line_number == 1)[line] & has_name[line],
        "a capital letter": upper,
        "in a capitalised word": alphanumeric & upper[np.minimum(word_start, len(codes) - 1)],
        "a vowel": np.isin(codes, _codes("aeiouAEIOU")),
        "a digit": _where(codes, str.isdigit),
        "a space": space & ~newline,
        "a line break": newline,
        "a blank line": newline & blank[line],
        "a punctuation mark": ~space & ~alphanumeric,
    }
    numbers = {
        "depth of braces { }": _depth(codes, "{", "}", np.zeros_like(index)),
        "indentation of the line": np.where(blank, 0, first_dark - first)[line],
        "position in the line": index - first[line],
        "characters left in the line": end[line] - index,
        "position in the word": np.where(alphanumeric, index - word_start + 1, 0),
        "characters since the sentence began": np.maximum(index - sentence_end - 1, 0),
        "line number in the speech or paragraph": line_number[line],
    }
    return {name: x.astype(np.float32) for name, x in (booleans | numbers).items()}


def _where(codes: np.ndarray, test: Callable[[str], bool]) -> np.ndarray:
    """Whether each code point passes a test of strings: bool [n]."""
    different, inverse = np.unique(codes, return_inverse=True)
    return np.array([test(chr(code)) for code in different], bool)[inverse]


def _codes(characters: str) -> list[int]:
    return [ord(character) for character in characters]


def _last(events: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The position of the last event before or at each position, -1 where there is none."""
    return np.maximum.accumulate(np.where(events, index, -1))


def _depth(codes: np.ndarray, opens: str, closes: str, start: np.ndarray) -> np.ndarray:
    """How many brackets are open at each position, of those since `start` [n]: int [n].

    The mark that opens is inside, the one that closes is not. One that closes nothing is passed
    over.
    """
    change = np.isin(codes, _codes(opens)).astype(int) - np.isin(codes, _codes(closes))
    # What is open is how far the sum has risen from its lowest point since `start`. To have each
    # part counted for itself, it sinks at each start by more than it can ever rise.
    before_start = np.append(0, np.cumsum(change))[start]
    part = np.cumsum(np.append(0, start[1:] != start[:-1]))
    total = np.cumsum(change) - before_start - part * (2 * len(codes) + 1)
    lowest = np.minimum.accumulate(np.minimum(total, -part * (2 * len(codes) + 1)))
    return total - lowest


def _odd(codes: np.ndarray, mark: str, start: np.ndarray) -> np.ndarray:
    """Whether an odd number of marks stands between `start` and each position, with it: 0 or 1."""
    count = np.cumsum(codes == ord(mark))
    return (count - np.append(0, count)[start]) % 2


def compute_correlations(activations: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each feature with each cell: float32 [features, cells].

    Those of a feature or a cell that is the same everywhere are 0.

    Args:
      activations: [cells, n], of any type and scale.
      features: float32 [features, n].
    """
    standard = _standardise(features)
    blocks = [
        standard @ _standardise(activations[start : start + _BLOCK]).T
        for start in range(0, len(activations), _BLOCK)
    ]
    return np.concatenate(blocks, axis=1) / features.shape[1]


def _standardise(rows: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and variance 1, or of zeros where all are the same: float32."""
    centred = rows - rows.mean(axis=1, keepdims=True, dtype=np.float32)
    deviation = centred.std(axis=1, keepdims=True)
    return np.divide(
        centred, deviation, out=np.zeros_like(centred, np.float32), where=deviation > 1e-6
    )


def select_present(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of which each half of a text has enough of the commonest value, and of others."""

    def varies(values: np.ndarray) -> bool:
        _, counts = np.unique(values, return_counts=True)
        return len(values) - counts.max(initial=0) >= _LEAST and counts.max() >= _LEAST

    halfway = [len(values) // 2 for values in features.values()]
    return {
        name: values
        for (name, values), half in zip(features.items(), halfway, strict=True)
        if half and varies(values[:half]) and varies(values[half:])
    }


def find_followers(
    activations: np.ndarray, features: np.ndarray, each: int
) -> tuple[list[list[Follower]], np.ndarray]:
    """The cells that follow each feature, chosen on one half of a text and judged on the other.

    Args:
      activations: [cells, n].
      features: float32 [features, n], those that are `select_present`.
      each: how many cells are chosen for a feature: those most correlated, in either sense.

    Returns:
      For each feature those of the chosen cells that are correlated with it beyond chance in the
      second half too, in the same sense, in the order of the first half; and the correlations in
      the second half of all features with all cells, float32 [features, cells].
    """
    half = activations.shape[1] // 2
    searched = compute_correlations(activations[:, :half], features[:, :half])
    judged = compute_correlations(activations[:, half:], features[:, half:])
    found = []
    for number, row in enumerate(searched):
        best = np.argsort(-np.abs(row), kind="stable")[:each]
        chance = _chance(activations[best, half:], features[number, half:])
        candidates = [
            Follower(number, int(cell), float(row[cell]), float(judged[number, cell]), float(level))
            for cell, level in zip(best, chance, strict=True)
        ]
        found.append(
            [f for f in candidates if f.correlation * np.sign(f.searched) > max(f.chance, 0.0)]
        )
    return found, judged


def _chance(activations: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """The 99th percentile of absolute correlations over all circular shifts: [cells]."""
    n = len(feature)
    spectrum = np.fft.rfft(_standardise(feature[None])).conj()
    shifted = np.fft.irfft(np.fft.rfft(_standardise(activations)) * spectrum, n) / n
    return np.quantile(np.abs(shifted), 0.99, axis=1)
