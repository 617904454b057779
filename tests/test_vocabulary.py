import numpy as np
import pytest

from lstm_jax.vocabulary import Vocabulary


def test_tiny_shakespeare_has_67_units_in_order(shakespeare: dict[str, str]) -> None:
    vocabulary = Vocabulary.from_text(shakespeare["train"])
    assert len(vocabulary) == 67
    assert list(vocabulary.units[:4]) == ["", "[UNK]", "\n", " "]
    assert list(vocabulary.units[2:]) == sorted(vocabulary.units[2:])
    ids = vocabulary.encode("First Citizen:\n")
    assert ids.tolist() == [20, 49, 58, 59, 60, 3, 17, 49, 60, 49, 66, 45, 54, 12, 2]
    assert ids.dtype == np.int32


@pytest.mark.parametrize("text", ["a\r\nb\0c", "e\u0301 שלום 日本語", "😀\U0010ffff\u2028", ""])
def test_encode_then_decode_gives_the_text_back(text: str) -> None:
    vocabulary = Vocabulary.from_text(text)
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again.units == vocabulary.units
    assert again.decode(again.encode(text)) == text
    assert len(again.encode(text)) == len(text)


def test_unknown_characters_become_unk() -> None:
    vocabulary = Vocabulary.from_text("abc")
    assert vocabulary.encode("axb\ud800").tolist() == [2, 1, 3, 1]
    assert vocabulary.decode([2, 0, 1]) == "a[UNK]"
    assert vocabulary.unknown("zaxz") == "xz"


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "{}",
        '{"units": 3}',
        '{"units": ["a", "b"]}',
        '{"units": ["", "[UNK]", "ab"]}',
        '{"units": ["", "[UNK]", "a", "a"]}',
        '{"units": ["", "[UNK]", 5]}',
    ],
)
def test_a_damaged_file_is_refused(damaged: str) -> None:
    with pytest.raises(ValueError):
        Vocabulary.from_json(damaged)
