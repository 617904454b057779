"""Compute features of a text, such as the position in a line; find hidden units that follow them.

A feature is a number for each character, computed from the text alone. A hidden unit follows a
feature if the two are correlated. Of a thousand hidden units, some are correlated with any feature
by chance, so they are selected on the first half of a text and evaluated on the second.
"""

import numpy as np
import regex

from lstm_jax.vocabulary import Vocabulary

_PUNCTUATION = "!-/:-@\\[-`{-~«»\u2010-\u2027、。"
# Patterns whose first groups are the characters with the feature.
_INSIDE = {
    "inside a speaker's name": r"(?:\A|\r?\n\r?\n)([^\n:]{1,40}):(?=\r?\n)",
    # A mark that nothing closes ends with its paragraph.
    "inside quotation marks": r'(["“«](?:(?!\r?\n\r?\n)[^"”»])*)["”»]?',
    "inside brackets": r"([(\[](?:(?!\r?\n\r?\n)[^)\]])*)[)\]]?",
    "a digit": r"(\d)",
    "a space": r"( )",
    "a line break": r"(\n)",
    "a punctuation mark": rf"([{_PUNCTUATION}])",
    "a capital letter": r"(\p{Lu})",
}
# Patterns of lines and words, in which characters are counted from 1.
_POSITIONS = {
    "position in the line": r"[^\n]*\n?",
    "position in the word": rf"[^\s{_PUNCTUATION}]+",
}
_LEAST = 0.1  # The lowest absolute correlation of a hidden unit that follows a feature.
_BLOCK = 128  # The number of hidden units to correlate at a time, to bound memory.


def compute_features(text: str, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Return the features of the last character of each token of a text, by name: float32 [n].

    Booleans are 1 and 0. All features depend on the text up to and including the character, except
    for the names of speakers, which end in a colon.
    """
    tokens = vocabulary.split(text)  # They may leave white space out.
    text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens]) - 1
    features = {name: np.zeros(len(text), np.float32) for name in [*_INSIDE, *_POSITIONS]}
    for name, pattern in _INSIDE.items():
        for match in regex.finditer(pattern, text):
            features[name][slice(*match.span(1))] = 1
    for name, pattern in _POSITIONS.items():
        for match in regex.finditer(pattern, text):
            features[name][slice(*match.span())] = np.arange(1, len(match[0]) + 1)
    return {name: feature[ends] for name, feature in features.items()}


def compute_correlations(activations: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return Pearson correlations, 0 where either is constant: float64 [features, hidden_units].

    Activations are [hidden_units, n], features [features, n], of any dtype and scale.
    """
    blocks = np.array_split(activations, -(-len(activations) // _BLOCK))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.corrcoef(features, block)[: len(features), len(features) :] for block in blocks]
    return np.nan_to_num(np.concatenate(parts, axis=1))


def find_followers(
    activations: np.ndarray, features: np.ndarray, each: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Find the hidden units that follow each feature; arguments as for `compute_correlations`.

    Returns:
      Pairs of a feature and a hidden unit: of the `each` units with the largest absolute
      correlations with each feature in the first half, those whose correlation in the second half
      has the same sign and is at least `_LEAST`, the feature that is followed most closely first;
      and the correlations in the second half, float64 [features, hidden_units].
    """
    half = activations.shape[1] // 2
    first_half = compute_correlations(activations[:, :half], features[:, :half])
    second_half = compute_correlations(activations[:, half:], features[:, half:])
    rows = []
    for i, (first, second) in enumerate(zip(first_half, second_half, strict=True)):
        best = np.argsort(-np.abs(first), kind="stable")[:each]
        followers = best[second[best] * np.sign(first[best]) >= _LEAST]
        rows.append([(i, int(k)) for k in followers])
    rows.sort(key=lambda row: -abs(second_half[row[0]]) if row else 0)
    return [pair for row in rows for pair in row], second_half
