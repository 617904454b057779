"""How much of a text stands verbatim in another: what a model copied from its training."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Runs longer than this count as copied; shorter ones any two texts of one language share.
COMMON_RUN = 20
_BASE = 0x9E3779B97F4A7C15  # Any large odd number will do.


class Novelty(NamedTuple):
    """What of a text was copied.

    Attributes:
      longest_run: the longest run of characters that stands in the training text, too.
      copied_share: the share of the characters that stand in copied runs longer than `COMMON_RUN`.
    """

    longest_run: str
    copied_share: float


def measure_novelty(text: str, training_text: Iterable[str]) -> Novelty:
    """Finds what of `text` stands verbatim in the training text.

    Args:
      text: what was written.
      training_text: in pieces, each with as many characters of those before it as `text` has.
    """
    ours = _Windows(text)
    length = COMMON_RUN + 1
    covered = np.zeros(len(text) + 1, bool)
    longest = ""
    for piece in training_text:
        hashes = ours, _Windows(piece)
        changes = np.zeros(len(text) + 1, np.int64)
        copied = _copied(*hashes, length)
        np.add.at(changes, copied, 1)
        np.add.at(changes, copied + length, -1)
        covered |= np.cumsum(changes) > 0
        longest = _longest_run(text, *hashes, longest)
    return Novelty(longest, np.count_nonzero(covered) / max(len(text), 1))


def _longest_run(text: str, ours: "_Windows", theirs: "_Windows", longest: str) -> str:
    """The longest run that stands in both, if it is longer than the `longest` until now."""
    # By bisection, as with a run of some length come runs of all shorter ones. Most texts have no
    # long runs, so the length doubles until there is none; most pieces none longer than that of
    # another, so the first length is one more.
    before, missing = len(longest), len(text) + 1
    found = before
    while missing - found > 1:
        probe = found + 1 if found == before > 0 else max(2 * found, COMMON_RUN + 1)
        probe = min(probe, (found + missing) // 2)
        copied = _copied(ours, theirs, probe)
        if len(copied):
            found, longest = probe, text[copied[0] : copied[0] + probe]
        else:
            missing = probe
    return longest


class _Windows:
    """Hashes of all windows of a text.

    The hash of a window of n characters at i is the sum of c[i + j] * base**j over j, modulo 2**64
    (Karp & Rabin 1987), so that all follow from sums over the text's beginnings.
    """

    def __init__(self, text: str) -> None:
        """Takes the text."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        powers = np.full(len(codes) + 1, _BASE, np.uint64)
        inverses = np.full(len(codes) + 1, pow(_BASE, -1, 2**64), np.uint64)
        powers[0] = inverses[0] = 1
        self._inverses = np.cumprod(inverses)
        self._sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(codes * np.cumprod(powers)[:-1], out=self._sums[1:])

    def hashes(self, length: int) -> np.ndarray:
        """The hash of the window of this length at each position: uint64 [windows]."""
        windows = max(len(self._sums) - length, 0)
        ends = self._sums[length : length + windows]
        return (ends - self._sums[:windows]) * self._inverses[:windows]


def _copied(text: _Windows, training_text: _Windows, length: int) -> np.ndarray:
    """The positions in the text of the windows that stand in the training text, too."""
    ours, theirs = text.hashes(length), training_text.hashes(length)
    # Most windows of the training text are ruled out by a table of the first bits of ours.
    shift = np.uint64(64 - 22)
    table = np.zeros(2**22, bool)
    table[ours >> shift] = True
    return np.flatnonzero(np.isin(ours, theirs[table[theirs >> shift]]))
