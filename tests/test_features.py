import pytest

from lstm_jax import features

PLAY = """\
First Citizen:
We (all) go.
No "more" So

ROMEO:
  O me!
"""


def marks(name: str, text: str) -> str:
    """Where a feature is 1, "-" elsewhere."""
    return "".join("-1"[int(x)] for x in features.of_text(text)[name])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("inside a speaker's name", "A Bc:\nDe: f\n\nG:\nH", "1111---------1---"),
        ("the line after a speaker's name", "A:\nbc\nd\n\ne\nf", "---111------"),
        ("inside quotation marks", 'a "b" c', "--11---"),
        ("inside quotation marks", 'a "b\n\nc "d"', "--1111--11-"),
        ("inside quotation marks", "“a” «b»", "11--11-"),
        ("inside brackets ( ) [ ]", "a) (b[c]d) e", "---111111---"),
        ("inside brackets ( ) [ ]", "(a\n\nb)", "1111--"),
        ("inside a tag < >", "<a>b <c\nd", "11---111-"),
        ("a capital letter", "aBÉ", "-11"),
        ("in a capitalised word", "Ab cD Éa", "11----11"),
        ("a vowel", "abE", "1-1"),
        ("a digit", "a12", "-11"),
        ("a space", "a b\n", "-1--"),
        ("a line break", "a b\n", "---1"),
        ("a blank line", "a\n\n \nb", "--1-1-"),
        ("a punctuation mark", "a, b!", "-1--1"),
    ],
)
def test_what_is_true_or_not(name: str, text: str, expected: str) -> None:
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
def test_numbers(name: str, text: str, expected: list[int]) -> None:
    assert features.of_text(text)[name].tolist() == expected
