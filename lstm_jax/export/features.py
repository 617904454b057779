"""Compute features of a text, such as the position in a line; find hidden units that follow them.

A feature is a number for each character, computed from the text alone. A hidden unit follows a
feature if the two are correlated. Of a thousand hidden units, some are correlated with any feature
by chance, so they are selected on the first half of a text and evaluated on the second.
"""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lstm_jax.vocabulary import Vocabulary

_MAX_NAME = 40  # Characters of a speaker's name.
_BLOCK = 128  # The number of hidden units to correlate at a time, to bound memory.


class Follower(NamedTuple):
    """A hidden unit that follows a feature."""

    feature: int  # Its index.
    hidden_unit: int  # Its index.
    correlation: float  # In the second half of the text; it was selected in the first.


def compute_features(text: str, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Return the features of the last character of each token of a text, by name: float32 [n]."""
    tokens = vocabulary.split(text)
    # The same text, unless the kind of tokens leaves white space out.
    text = "".join(tokens).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    # The last byte of each token, and the character of each byte, for tokens of any kind.
    last_bytes = np.cumsum(_count_bytes(tokens)) - 1
    characters = np.repeat(np.arange(len(text)), _count_bytes(text))[last_bytes]
    return {name: values[characters] for name, values in compute_text_features(text).items()}


def _count_bytes(texts: Iterable[str]) -> np.ndarray:
    """Return the number of bytes of each text: int64 [n]."""
    return np.array([len(text.encode("utf-8", "surrogateescape")) for text in texts], np.int64)


def compute_text_features(text: str) -> dict[str, np.ndarray]:
    """Return the features of each character of a text, by name: float32 [n].

    Booleans are 1 or 0. All features depend on the text up to and including the character, except
    "characters left in the line" and the names of speakers, which end in a colon.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    characters, index = codes.view("U1"), np.arange(len(codes))
    space, alphanumeric = np.strings.isspace(characters), np.strings.isalnum(characters)
    upper, newline = np.strings.isupper(characters), codes == ord("\n")
    different, inverse = np.unique(codes, return_inverse=True)
    marks = [unicodedata.category(chr(c))[0] == "M" for c in different]  # Accents, vowel signs.
    alphanumeric |= np.array(marks, bool)[inverse]
    # The last position before the word or the sentence of each character, -1 if there is none.
    before_word = np.maximum.accumulate(np.where(alphanumeric, -1, index))
    before_sentence = np.maximum.accumulate(np.where(_is_in(codes, ".!?"), index, -1))
    features = {
        **_compute_line_features(codes, space),
        "a capital letter": upper,
        "in a capitalized word": alphanumeric & upper[np.minimum(before_word + 1, len(codes) - 1)],
        "a vowel": _is_in(codes, "aeiouAEIOU"),
        "a digit": np.strings.isdigit(characters),
        "a space": space & ~newline,
        "a line break": newline,
        "a punctuation mark": ~space & ~alphanumeric,
        "position in the word": np.where(alphanumeric, index - before_word, 0),
        "characters since the sentence began": np.maximum(index - before_sentence - 1, 0),
    }
    return {name: values.astype(np.float32) for name, values in features.items()}


def _compute_line_features(codes: np.ndarray, space: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features of lines and paragraphs, from code points [n] and white space [n]."""
    newline, index = codes == ord("\n"), np.arange(len(codes))
    # Each line has the newline that ends it. A last line without a newline ends at its end.
    line = np.cumsum(newline) - newline
    first = np.flatnonzero(np.append(True, newline[:-1]))
    end = np.append(first[1:], len(codes)) - 1
    first_inked = np.minimum.reduceat(np.where(space, len(codes), index), first)
    last_inked = np.maximum.reduceat(np.where(space, -1, index), first)
    blank = last_inked < 0
    starts_paragraph = ~blank & np.append(True, blank[:-1])
    paragraph_line = np.maximum.accumulate(np.where(starts_paragraph, np.arange(len(first)), 0))
    paragraph_start = first[paragraph_line][line]

    # Speakers, as plays name them: a short line that begins a paragraph and ends in a colon.
    names = starts_paragraph & (codes[last_inked] == ord(":")) & (last_inked - first < _MAX_NAME)
    has_name = names[paragraph_line]
    line_number = np.where(blank, 0, np.arange(len(first)) - paragraph_line + ~has_name)
    straight = np.cumsum(codes == ord('"'))
    inside_quotes = _count_open(codes, "“«", "”»", paragraph_start)
    inside_quotes += (straight - np.append(0, straight)[paragraph_start]) % 2
    return {
        "inside quotation marks": inside_quotes > 0,
        "inside brackets ( ) [ ]": _count_open(codes, "([", ")]", paragraph_start) > 0,
        "inside a speaker's name": names[line] & (index < last_inked[line]),
        "the line after a speaker's name": (line_number == 1)[line] & has_name[line],
        "a blank line": newline & blank[line],
        "depth of braces { }": _count_open(codes, "{", "}", np.zeros_like(index)),
        "indentation of the line": np.where(blank, 0, first_inked - first)[line],
        "position in the line": index - first[line],
        "characters left in the line": end[line] - index,
        "line number in the speech or paragraph": line_number[line],
    }


def _is_in(codes: np.ndarray, characters: str) -> np.ndarray:
    return np.isin(codes, [ord(character) for character in characters])


def _count_open(codes: np.ndarray, opens: str, closes: str, start: np.ndarray) -> np.ndarray:
    """Count the brackets opened since `start` [n] that are open at each position: int [n].

    The opening mark is inside, the closing one is not. A mark that closes nothing is ignored.
    """
    change = _is_in(codes, opens).astype(int) - _is_in(codes, closes)
    # The number is the rise of the sum from its lowest point since `start`. To separate the parts,
    # it drops at each start by more than it can ever rise.
    before_start = np.append(0, np.cumsum(change))[start]
    drop = np.cumsum(np.append(0, start[1:] != start[:-1])) * (2 * len(codes) + 1)
    total = np.cumsum(change) - before_start - drop
    return total - np.minimum.accumulate(np.minimum(total, -drop))


def compute_correlations(activations: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return Pearson correlations, 0 where either is constant: float32 [features, hidden_units].

    Activations are [hidden_units, n], of any dtype and scale, features float32 [features, n].
    """
    standard = _standardize(features)
    blocks = [
        standard @ _standardize(activations[start : start + _BLOCK]).T
        for start in range(0, len(activations), _BLOCK)
    ]
    return np.concatenate(blocks, axis=1) / features.shape[1]


def _standardize(rows: np.ndarray) -> np.ndarray:
    """Scale rows to mean 0 and variance 1, constant rows to zeros: float32."""
    centered = rows - rows.mean(axis=1, keepdims=True, dtype=np.float32)
    deviation = centered.std(axis=1, keepdims=True)
    zeros = np.zeros_like(centered, np.float32)
    return np.divide(centered, deviation, out=zeros, where=deviation > 1e-6)


def find_followers(
    activations: np.ndarray, features: np.ndarray, each: int
) -> tuple[list[Follower], np.ndarray]:
    """Find the hidden units that follow each feature; arguments as for `compute_correlations`.

    Returns:
      Of the `each` hidden units with the largest absolute correlations with each feature in the
      first half, those whose correlation in the second half is beyond chance (`_compute_chance`)
      and has the same sign, the feature that is followed most closely first; and the correlations
      in the second half, float32 [features, hidden_units].
    """
    half = activations.shape[1] // 2
    first_half = compute_correlations(activations[:, :half], features[:, :half])
    second_half = compute_correlations(activations[:, half:], features[:, half:])
    rows = []
    for feature, row in enumerate(first_half):
        best = np.argsort(-np.abs(row), kind="stable")[:each]
        chance = _compute_chance(activations[best, half:], features[feature, half:])
        correlations = second_half[feature, best]
        beyond = correlations * np.sign(row[best]) > chance
        pairs = zip(best[beyond].tolist(), correlations[beyond].tolist(), strict=True)
        rows.append([Follower(feature, *pair) for pair in pairs])
    rows.sort(key=lambda row: -abs(row[0].correlation) if row else 0)
    return [follower for row in rows for follower in row], second_half


def _compute_chance(activations: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """Return the 99th percentile of absolute correlations [hidden_units] over circular shifts.

    A slowly changing hidden unit is correlated with any slowly changing feature.
    """
    n = len(feature)
    spectrum = np.fft.rfft(_standardize(feature[None])).conj()
    shifted = np.fft.irfft(np.fft.rfft(_standardize(activations)) * spectrum, n) / n
    return np.quantile(np.abs(shifted), 0.99, axis=1)
