"""Mix the probabilities of a model with those of n-grams, and measure the mixture.

    python examples/ngrams.py runs/quick train.txt validation.txt test.txt

The n-grams are characters of the training text, and so must the tokens of the model be. Their
counts are interpolated as in method C of Witten and Bell (1991): c(abc) is the number of times that
abc occurs, t(ab) the number of different characters that follow ab, and

    p(c | ab) = (c(abc) + t(ab) p(c | b)) / (c(ab) + t(ab)).

The first text after it chooses n and the weight of the n-grams, and all are measured.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

import lstm_jax


class NGrams:
    """The probabilities of characters given the n - 1 before them, from the counts of a text."""

    def __init__(self, text: str) -> None:
        self.alphabet = np.unique(np.array(list(text)))
        self._size = len(self.alphabet) + 1  # Id 0 is any other character.
        self._ids = self._encode(text)

    def _encode(self, text: str) -> np.ndarray:
        characters = np.array(list(text))
        places = np.searchsorted(self.alphabet, characters).clip(max=self._size - 2)
        return np.where(self.alphabet[places] == characters, places + 1, 0)

    def _make_keys(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return one number for the n-gram that ends at each id; zeros precede the first."""
        keys = np.zeros(len(ids), np.int64)
        for distance in range(min(n, len(ids))):
            keys[distance:] += ids[: len(ids) - distance] * self._size**distance
        return keys

    def predict(self, text: str, longest: int) -> np.ndarray:
        """Return the probability of each character for n from 1 to `longest`: [n, characters]."""
        if self._size**longest >= 2**63:
            raise SystemExit(f"n-grams of {longest} of {self._size} characters are too many")
        ids, rows = self._encode(text), [np.full(len(text), 1 / self._size)]
        for n in range(1, longest + 1):
            known, counts = np.unique(self._make_keys(self._ids, n)[n - 1 :], return_counts=True)
            contexts, first = np.unique(known // self._size, return_index=True)
            keys = self._make_keys(ids, n)
            count = _look_up(known, counts, keys)
            total = _look_up(contexts, np.add.reduceat(counts, first), keys // self._size)
            types = _look_up(contexts, np.diff(first, append=len(known)), keys // self._size)
            seen = total > 0
            mixed = (count + types * rows[-1]) / np.where(seen, total + types, 1)
            rows.append(np.where(seen, mixed, rows[-1]))
        return np.array(rows[1:])


def _look_up(known: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the value of each key, or 0 for a key that is not known; `known` is sorted."""
    places = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[places] == keys, values[places], 0)


def read_text(path: Path) -> str:
    """Return a text with its line breaks as they are."""
    return path.read_bytes().decode("utf-8-sig")


def mix(losses: np.ndarray, predicted: np.ndarray, weight: float) -> float:
    """Return the mean loss of the mixture, in nats."""
    return -float(np.mean(np.log((1 - weight) * np.exp(-losses) + weight * predicted)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads")
    parser.add_argument("train", type=Path, help="the training text")
    parser.add_argument("texts", type=Path, nargs="+", help="the texts to measure")
    parser.add_argument("--longest", type=int, default=6, help="the largest n")
    options = parser.parse_args()
    run, ngrams, chosen = lstm_jax.load(options.model), NGrams(read_text(options.train)), None
    for path in options.texts:
        text = read_text(path)
        losses = -run.score(text).log_probs  # Of all characters but the first.
        predicted = ngrams.predict(text, options.longest)[:, 1:]
        if not chosen:
            grid = itertools.product(np.linspace(0, 1, 101), range(options.longest))
            chosen = min(grid, key=lambda x: mix(losses, predicted[x[1]], x[0]))
            print(f"n is {chosen[1] + 1}, the weight of the n-grams {chosen[0]:.2f}")
        alone = [mix(losses, predicted[chosen[1]], weight) for weight in (0, 1)]
        mixed = mix(losses, predicted[chosen[1]], chosen[0])
        print(f"{path}: model {alone[0]:.3f}, n-grams {alone[1]:.3f}, mixed {mixed:.3f}")
