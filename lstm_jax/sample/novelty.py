"""Measure how much of a text is copied verbatim from the training text."""

import bisect
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Longer runs count as copied. Any two texts in one language share runs of up to this length.
COMMON_RUN = 20
_BASE = np.uint64(0x9E3779B97F4A7C15)  # A large odd number.
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


class Novelty(NamedTuple):
    """The copied parts of a text."""

    longest_run: str  # The longest run of characters that is also in the training text.
    copied_share: float  # The share of the characters in copied runs longer than `COMMON_RUN`.


def measure_novelty(text: str, training_text: Iterable[str]) -> Novelty:
    """Find the parts of a text that are verbatim in the training text.

    The training text is in pieces. Each begins with the last `len(text)` characters before it.
    """
    ours, length, longest = _Windows(text), COMMON_RUN + 1, ""
    covered = np.zeros(len(text) + 1, bool)
    for piece in training_text:
        theirs = _Windows(piece)
        copied = _find_copied(ours, theirs, length)
        changes = np.zeros(len(text) + 1, np.int64)
        np.add.at(changes, copied, 1)
        np.add.at(changes, copied + length, -1)
        covered |= np.cumsum(changes) > 0
        # Most pieces have no run longer than the longest so far. Its length is found by
        # bisection, since a run contains shorter runs of every length.
        lengths = range(len(longest) + 1, len(text) + 1)
        if len(_find_copied(ours, theirs, lengths.start)):
            longer = bisect.bisect(lengths, 0, key=lambda n: not len(_find_copied(ours, theirs, n)))
            start = _find_copied(ours, theirs, lengths[longer - 1])[0]
            longest = text[start : start + lengths[longer - 1]]
    return Novelty(longest, np.count_nonzero(covered) / max(len(text), 1))


class _Windows:
    """Hashes of all windows of a text.

    The hash of n characters at i is the sum of c[i + j] * base**j over j, modulo 2**64 (Karp and
    Rabin 1987), so all hashes follow from cumulative sums.
    """

    def __init__(self, text: str) -> None:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        exponents = np.arange(len(codes), dtype=np.uint64)
        self._inverses = _INVERSE**exponents
        self._sums = np.append(np.uint64(0), np.cumsum(codes * _BASE**exponents))

    def hash_all(self, length: int) -> np.ndarray:
        """Return the hash of the window of this length at each position: uint64 [windows]."""
        windows = max(len(self._sums) - length, 0)
        ends = self._sums[length : length + windows]
        return (ends - self._sums[:windows]) * self._inverses[:windows]


def _find_copied(text: _Windows, training_text: _Windows, length: int) -> np.ndarray:
    """Return the positions of the windows of a text that are also in the training text."""
    ours, theirs = text.hash_all(length), training_text.hash_all(length)
    # A table of the first bits of our hashes rules out most windows of the training text.
    shift = np.uint64(64 - 22)
    table = np.zeros(2**22, bool)
    table[ours >> shift] = True
    return np.flatnonzero(np.isin(ours, theirs[table[theirs >> shift]]))
