"""Mix the probabilities of a model with those of n-grams, and measure the mixture.

    python examples/ngrams.py runs/quick train.txt validation.txt test.txt

The n-grams consist of the tokens of the model. Some are counted in the training text and the text
read so far, others only in the text read so far. Counts are interpolated as in method C of Witten
and Bell (1991): c(abc) is the number of times that abc occurs, t(ab) the number of different tokens
that follow ab, and

    p(c | ab) = (c(abc) + t(ab) p(c | b)) / (c(ab) + t(ab)).

The weights of a mixture depend on the length of the longest known context, and are the best ones
on the first text after the training text. Several models, separated by commas, are an ensemble.
"""

import argparse
import copy
from collections import Counter
from pathlib import Path

import numpy as np

import lstm_jax
from lstm_jax import dynamic
from lstm_jax.ensemble import list_members


class NGrams:
    """Predicts each character of a text, one of `size`, by those before it, and counts it."""

    def __init__(self, size: int, longest: int) -> None:
        self._size, self._longest, self._text = size, longest, ""
        self._counts = Counter[str]()  # Of n-grams.
        self._totals, self._types = Counter[str](), Counter[str]()  # Of what follows a context.

    def read(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability of each character, and the length of its known context."""
        self._text, start = self._text + text, len(self._text)
        read = [self._read_character(i) for i in range(start, len(self._text))]
        probabilities, lengths = zip(*read, strict=True)
        return np.array(probabilities), np.array(lengths)

    def _read_character(self, i: int) -> tuple[float, int]:
        probability, known = 1 / self._size, 0
        for start in range(i, max(-1, i - self._longest), -1):
            context, ngram = self._text[start:i], self._text[start : i + 1]
            if total := self._totals[context]:
                types, known = self._types[context], i - start
                probability = (self._counts[ngram] + types * probability) / (total + types)
            self._types[context] += ngram not in self._counts
            self._totals[context] += 1
            self._counts[ngram] += 1
        return probability, known


def fit_weights(experts: np.ndarray, lengths: np.ndarray, longest: int) -> np.ndarray:
    """Return the best weights of experts for each length, [longest, experts], by 50 steps of EM.

    `experts` [experts, n] are the probabilities of tokens, and `lengths` [n] those of their
    contexts. A length that does not occur has the first expert alone.
    """
    weights = np.eye(len(experts))[np.zeros(longest, int)]
    for length in np.unique(lengths):
        weight = np.full((len(experts), 1), 1 / len(experts))
        for _ in range(50):
            shares = weight * experts[:, lengths == length]
            weight = (shares / shares.sum(axis=0)).mean(axis=1, keepdims=True)
        weights[length] = weight[:, 0]
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads; several: an ensemble")
    parser.add_argument("train", type=Path, help="the training text")
    parser.add_argument("texts", type=Path, nargs="+", help="the texts to measure")
    parser.add_argument("--dynamic", type=float, nargs="+", help="RATE DECAY LENGTH [EPSILON]")
    parser.add_argument("--longest", type=int, default=8, help="largest n; 4 saves memory")
    args = parser.parse_args()
    run, longest, weights = lstm_jax.load(args.model.split(",")), args.longest, None
    members, size = list_members(run.model, run.params), len(run.vocabulary)
    texts = [path.read_bytes().decode("utf-8-sig") for path in [args.train, *args.texts]]
    ids = [np.array(run.vocabulary.encode(text)) for text in texts]
    coded = ["".join(map(chr, each)) for each in ids]  # A character for each token.
    (trained := NGrams(size, longest)).read(coded[0])
    for i, path in enumerate(args.texts, 1):
        if args.dynamic:
            rate, decay, length, *epsilon = args.dynamic
            settings = dynamic.Settings(rate, decay, int(length), *epsilon)
            losses = dynamic.adapt_to_text(members, ids[0], ids[i], settings)
        else:
            losses = -run.score(texts[i]).log_probs
        both, lengths = copy.deepcopy(trained).read(coded[i])
        own, _ = NGrams(size, longest).read(coded[i])
        experts, lengths = np.stack([np.exp(-losses), both[1:], own[1:]]), lengths[1:]
        weights = fit_weights(experts, lengths, longest) if weights is None else weights
        mixed = (weights[lengths].T * experts).sum(axis=0)
        means = [-np.log(p).mean() for p in (*experts, mixed)]
        print("{}: model {:.4f}, n-grams {:.4f} and {:.4f}, mixed {:.4f}".format(path, *means))
