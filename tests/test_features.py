import numpy as np
import pytest

from lstm_jax.inspect import features
from lstm_jax.vocabulary import KINDS, Vocabulary


def marks(name: str, text: str) -> str:
    """Return "1" where a feature is 1, and "-" elsewhere."""
    return "".join("-1"[int(x)] for x in features.compute_text_features(text)[name])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("inside a speaker's name", "A Bc:\nDe: f\n\nG:\nH", "1111---------1---"),
        ("the line after a speaker's name", "A:\nbc\nd\n\ne\nf", "---111------"),
        ("inside quotation marks", 'a "b" c', "--11---"),
        ("inside quotation marks", 'a "b\n\nc "d"', "--1111--11-"),
        ("inside quotation marks", "“a” «b»", "11--11-"),
        ("inside quotation marks", "„a“ b „c” d", "11----11---"),
        ("inside brackets ( ) [ ]", "a) (b[c]d) e", "---111111---"),
        ("inside brackets ( ) [ ]", "(a\n\nb)", "1111--"),
        ("inside a tag < >", "<a>b <c\nd", "11---111-"),
        ("a capital letter", "aBÉ", "-11"),
        ("in a capitalized word", "Ab cD Éa", "11----11"),
        ("in a capitalized word", "E\u0301a b", "111--"),
        ("a punctuation mark", "हिन्दी!", "------1"),
        ("a vowel", "abE", "1-1"),
        ("a digit", "a12", "-11"),
        ("a space", "a b\n", "-1--"),
        ("a line break", "a b\n", "---1"),
        ("a blank line", "a\n\n \nb", "--1-1-"),
        ("a punctuation mark", "a, b!", "-1--1"),
    ],
)
def test_binary_features(name: str, text: str, expected: str) -> None:
    assert marks(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("depth of braces { }", "}{a{b\n\n}c}d", [0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0]),
        ("indentation of the line", "a\n  b\n  \n", [0, 0, 2, 2, 2, 2, 0, 0, 0]),
        ("position in the line", "ab\nc", [0, 1, 2, 0]),
        ("characters left in the line", "ab\ncd", [2, 1, 0, 1, 0]),
        ("position in the word", "ab c,d", [1, 2, 0, 1, 0, 1]),
        ("characters since the sentence began", "ab. c", [0, 1, 0, 0, 1]),
        (
            "line number in the speech or paragraph",
            "A:\nb\nc\n\nd\n",
            [0, 0, 0, 1, 1, 2, 2, 0, 1, 1],
        ),
    ],
)
def test_numeric_features(name: str, text: str, expected: list[int]) -> None:
    assert features.compute_text_features(text)[name].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["", "\n\n"])
def test_a_token_has_the_features_of_its_last_character(kind: str, stop: str) -> None:
    text = "Où?\n\ne\u0301te\u0301 (là)"
    vocabulary = Vocabulary.from_text(text, kind, stop=stop)
    got = features.compute_features(text, vocabulary)
    if kind == "tokens":
        text = "".join(vocabulary.split(text))
    ends = np.cumsum([len(token) for token in vocabulary.split(text)]) - 1
    if kind == "bytes":
        chars = "".join(character * len(character.encode()) for character in text)
        chars = chars.replace("\n\n", "\n") if stop else chars
        assert [chars[k].isupper() for k in range(len(chars))] == got["a capital letter"].tolist()
    else:
        for name, values in features.compute_text_features(text).items():
            assert got[name].tolist() == values[ends].tolist(), name
    assert all(len(values) == len(vocabulary.encode(text)) for values in got.values())


@pytest.mark.parametrize("text", ["\n", ":", "\r\n\r\nA:\r\nb", "\ud800(", "日本語\n"])
def test_any_text_has_features(text: str) -> None:
    got = features.compute_text_features(text)
    assert got and all(np.isfinite(values).all() and values.min() >= 0 for values in got.values())


def test_correlations_match_numpy() -> None:
    rng = np.random.default_rng(0)
    activations = rng.integers(-127, 128, (300, 500)).astype(np.int8)
    activations[7] = 5
    values = rng.normal(size=(3, 500)).astype(np.float32)
    values[2] = 1
    got = features.compute_correlations(activations, values)
    expected = np.corrcoef(values[:2], np.delete(activations, 7, axis=0))[:2, 2:]
    np.testing.assert_allclose(np.delete(got[:2], 7, axis=1), expected, atol=1e-5)
    assert not got[2].any() and not got[:, 7].any()


def test_hidden_units_correlated_by_chance_are_not_found() -> None:
    rng = np.random.default_rng(0)
    lines = "".join("x" * rng.integers(5, 60) + "\n" for _ in range(150))
    place = features.compute_text_features(lines)["position in the line"]
    n = len(place)
    activations = rng.integers(-127, 128, (400, n)).astype(np.int8)
    activations[40] = np.clip(3 * place - 80, -127, 127)
    # This one follows in the first half only.
    activations[50, : n // 2] = -activations[40, : n // 2]
    found, judged = features.find_followers(activations, place[None], 3)
    (follower,) = found[0]
    assert follower.hidden_unit == 40 and follower.correlation > 0.95 and follower.chance < 0.5
    half = n // 2
    assert judged[0, 40] == pytest.approx(np.corrcoef(place[half:], activations[40, half:])[0, 1])


def test_features_absent_from_half_of_the_text_are_dropped() -> None:
    text = "ab 1\n" * 20 + "ab c\n" * 20
    present = features.select_present(features.compute_text_features(text))
    assert "a digit" not in present and "position in the line" in present
    assert features.select_present(features.compute_text_features("a")) == {}
