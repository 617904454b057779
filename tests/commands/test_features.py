"""Features of texts, and the hidden units that follow them."""

import numpy as np
import pytest

from lstm_jax.export.features import compute_features, find_followers
from lstm_jax.vocabulary import KINDS, Vocabulary

CHARACTERS = Vocabulary.from_text("any")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("inside a speaker's name", "A Bc:\nDe: f\n\nG:\n\nH:\n", "11110000000001000100"),
        ("inside a speaker's name", "A:\r\nb\r\n\r\nC:\r\n", "1000000001000"),
        ("inside quotation marks", 'a "b\n\nc "d"', "00110000110"),
        ("inside quotation marks", '"b\r\n\r\nc', "1100000"),
        ("inside quotation marks", "“a” «b»", "1100110"),
        ("inside brackets", "a) (b[c]d) e", "000111100000"),
        ("a capital letter", "aBÉ", "011"),
        ("a punctuation mark", "हिन्दी, b!", "0000001001"),
        ("a digit", "a12", "011"),
        ("a space", "a b\n", "0100"),
        ("a line break", "a b\n", "0001"),
        ("position in the line", "ab\nc", "1231"),
        ("position in the word", "ab c,d", "120101"),
    ],
)
def test_features_of_characters(name: str, text: str, expected: str) -> None:
    assert "".join(f"{x:g}" for x in compute_features(text, CHARACTERS)[name]) == expected


def test_a_token_has_the_features_of_its_last_character() -> None:
    text = "Où?\n\nThe (cat)"
    for kind in KINDS:
        vocabulary = Vocabulary.from_text(text, kind, stop="\n\n")
        tokens = vocabulary.split(text)
        actual = compute_features(text, vocabulary)
        for name, test in (("a capital letter", str.isupper), ("a line break", "\n".__eq__)):
            np.testing.assert_array_equal(actual[name], [test(token[-1]) for token in tokens])


def test_any_text_has_features() -> None:
    for text in ("\n", ":", "\r\n\r\nA:\r\nb", "\ud800(", "日本語\n"):
        arrays = compute_features(text, CHARACTERS)
        assert arrays and all(np.isfinite(x).all() and x.min() >= 0 for x in arrays.values())


def test_hidden_units_correlated_by_chance_are_not_found() -> None:
    rng = np.random.default_rng(0)
    lines = "".join("x" * rng.integers(5, 60) + "\n" for _ in range(150))
    place = compute_features(lines, CHARACTERS)["position in the line"]
    half, n = len(place) // 2, len(place)
    activations = rng.integers(-127, 128, (400, n)).astype(np.int8)
    activations[40] = np.clip(3 * place - 80, -127, 127)
    activations[50, :half] = -activations[40, :half]  # It follows in the first half only.
    activations[60] = 5
    followers, correlations = find_followers(activations, place[None], 3)
    assert followers == [(0, 40)] and correlations[0, 40] > 0.95
    others = np.delete(activations[:, half:], 60, axis=0)
    expected = np.corrcoef(place[half:], others)[0, 1:]
    np.testing.assert_allclose(np.delete(correlations[0], 60), expected, atol=1e-5)
    assert correlations[0, 60] == 0
