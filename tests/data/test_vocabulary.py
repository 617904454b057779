"""Test tokens of each kind: encoding, decoding, and vocabularies of other texts."""

import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import draws
from lstm_jax.data import files
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.run.messages import make_printable
from lstm_jax.vocabulary import FILE_END, KINDS, Vocabulary, split_text

# Text from all planes of Unicode, and strings that are often split or decoded wrongly.
TEXTS = st.lists(
    st.text(max_size=8)
    | st.sampled_from(
        [
            *("\r\n", "\n\n", "\0", "e\u0301", "\u0301", "שָׁלוֹם", "\u202eright to left\u202c"),
            *("👨‍👩‍👧‍👦", "🇩🇪🇫", "한글", "เก่ง", " o'er", "[UNK]", "\ufeff", "\U0010ffff", "3.14"),
        ]
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["", "\n", "\n\n"])
@settings(max_examples=40 * draws.TIMES)
@given(text=TEXTS)
def test_decode_inverts_encode_for_any_text(kind: str, stop: str, text: str) -> None:
    text += stop
    if kind == "tokens":  # White space is lost; without it, the text is that of its tokens.
        text = "".join(split_text(text, kind, stop))
    vocabulary = Vocabulary.from_text(text, kind, stop=stop)
    again = Vocabulary.from_fields(json.loads(json.dumps(vocabulary.to_fields())))
    ids = again.encode(text)
    assert again.decode(ids) == text
    assert ids.dtype == np.int32 and not np.isin(ids, [0, 1]).any()
    assert again.tokens == vocabulary.tokens
    assert [again.tokens[i] for i in ids] == again.split(text)
    assert again.name_unknown(text) == ""
    # Decoding in pieces gives the same, and each piece is valid text.
    decode = again.make_decoder()
    pieces = [decode([i], False) for i in ids] + [decode([], True)]
    assert "".join(pieces) == text
    assert all(piece.encode() for piece in pieces if piece)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(max_examples=60 * draws.TIMES)
@given(text=TEXTS | st.text(max_size=200) | st.binary(max_size=60))
def test_bytes_and_subwords_hold_any_file_and_no_character_is_split(
    kind: str, text: str | bytes, text_file: Path
) -> None:
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    vocabulary = make_vocabulary(text_file, kind)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not np.isin(ids, [0, 1]).any() and vocabulary.name_unknown(text) == ""
    assert kind == "bpe" or len(ids) == len(text.encode("utf-8", "surrogateescape"))
    decode = vocabulary.make_decoder()
    pieces = [decode(ids[i : i + 3], False) for i in range(0, len(ids), 3)] + [decode([], True)]
    assert "".join(pieces) == text


@functools.cache
def make_vocabulary(text_file: Path, kind: str) -> Vocabulary:
    """Return the tokens of a text in English, without most characters of Unicode."""
    return Vocabulary.from_text(text_file.read_text(), kind, size=600)


def test_tiny_shakespeare_has_67_tokens_in_order(shakespeare: dict[str, str]) -> None:
    vocabulary = Vocabulary.from_text(shakespeare["train"])
    assert len(vocabulary) == 67
    assert list(vocabulary.tokens[:4]) == ["", "[UNK]", "\n", " "]
    assert list(vocabulary.tokens[2:]) == sorted(vocabulary.tokens[2:])
    ids = vocabulary.encode("First Citizen:\n")
    assert ids.tolist() == [20, 49, 58, 59, 60, 3, 17, 49, 60, 49, 66, 45, 54, 12, 2]
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("characters", ["e", "\u0301", " ", "o", "'", "e", "r", ",", "\r", "\n"]),
        ("words", ["e\u0301", " o'er", ",", "\r\n"]),
        ("tokens", [" e\u0301", " o'er,", "\n"]),
        ("bytes", ["e", "\udccc", "\udc81", " ", "o", "'", "e", "r", ",", "\r", "\n"]),
    ],
)
def test_tokens_of_each_kind(kind: str, tokens: list[str]) -> None:
    text = "e\u0301 o'er,\r\n"
    vocabulary = Vocabulary.from_text(text, kind)
    assert vocabulary.split(text) == tokens
    assert [vocabulary.tokens[i] for i in vocabulary.encode(text)] == tokens


def test_tokens_are_those_of_published_perplexities() -> None:
    """Tokens are counted as `line.split() + ["<eos>"]` does, and a line may begin with a space."""
    text = " the <unk> of N \n\n a&b  \tthe\nthe"
    vocabulary = Vocabulary.from_text(text, "tokens")
    ids = vocabulary.encode(text)
    assert len(ids) == len(text.split()) + text.count("\n")
    assert vocabulary.decode(ids) == " the <unk> of N\n\n a&b the\n the"
    assert set(vocabulary.tokens[2:]) == {"\n", *(f" {word}" for word in text.split())}
    assert vocabulary.token_name == "token"


# A regional indicator, of which two are a flag, several times, and one of most other classes of
# Unicode Standard Annex 29.
BREAKS = [
    *"🇦🇧🇨",
    *"\u0301\u200d😀a1:,'\"אア_ #\xad\u0600\u0903क\u094dᄀ\u1161\u11a8\n\r\u0e33\u0d4e",
]


@settings(max_examples=200 * draws.TIMES)
@given(text=st.lists(st.sampled_from([*"🇦🇧🇨🇩🇪", *BREAKS]), max_size=30).map("".join))
def test_words_are_those_of_unicode(text: str) -> None:
    assert list(split_text(text, "words", "")) == regex.findall(r"(?ws) ?\b\w.*?\b|\r\n|.", text)


@pytest.mark.parametrize("kind", ["words", "bpe"])
@pytest.mark.parametrize("repeated", ["🇦", "🇦\u0301", "🇦\xad", "a\u0301", "😀\u200d", "a'"])
def test_the_time_to_split_a_text_is_linear(kind: str, repeated: str) -> None:
    # In quadratic time, 40,000 flags take 5 s, and 80,000 take 20; in linear time, 10 ms.
    began = time.process_time()
    assert "".join(split_text(repeated * 40_000, kind, "")) == repeated * 40_000
    assert time.process_time() - began < 1


def test_documents_end_with_the_stop_token() -> None:
    text = "ab\n\nc\n\n\nd"
    for kind in KINDS:
        vocabulary = Vocabulary.from_text(text, kind, stop="\n\n")
        start = ["ab"] if kind in ("words", "tokens", "bpe") else ["a", "b"]
        space = " " if kind == "tokens" else ""
        assert vocabulary.split(text) == [
            *(f"{space}{token}" for token in start),
            *("\n\n", f"{space}c", "\n\n", "\n", f"{space}d"),
        ]
        assert vocabulary.stop_id is not None
        assert vocabulary.tokens[vocabulary.stop_id] == "\n\n"
        assert np.count_nonzero(vocabulary.encode(text) == vocabulary.stop_id) == 2
    # A stop token of one character is that character.
    assert Vocabulary.from_text(text, stop="\n").tokens == ("", "[UNK]", "\n", "a", "b", "c", "d")
    assert Vocabulary.from_text(text).stop_id is None
    # A stop token of several characters is no character.
    for (kind, stop), name in {
        ("words", ""): "word",
        ("characters", "\n"): "character",
        ("characters", "\n\n"): "token",
        ("bpe", ""): "token",
    }.items():
        assert Vocabulary(["", "[UNK]", *filter(None, [stop])], kind, stop).token_name == name
    with pytest.raises(UserError, match="no '\\\\n' to end its documents"):
        Vocabulary.from_text("ab", stop="\n")
    with pytest.raises(UserError, match="has no end of a file"):
        Vocabulary.from_text("ab", stop=FILE_END)


def test_rare_tokens_become_unk() -> None:
    text = "to be or not to be"
    vocabulary = Vocabulary.from_text(text, "words", min_count=2)
    assert vocabulary.tokens == ("", "[UNK]", " be")
    assert vocabulary.decode(vocabulary.encode(text)) == "[UNK] be[UNK][UNK][UNK] be"
    assert vocabulary.name_unknown(text) == "' not', ' or', ' to', 'to'"
    assert Vocabulary.from_text("abc").encode("axb\ud800").tolist() == [2, 1, 3, 1]
    with pytest.raises(UserError, match="none of the words .* occurs 3 times"):
        Vocabulary.from_text(text, "words", min_count=3)
    assert len(Vocabulary.from_text(text, "bytes", min_count=3)) == 258


def test_another_vocabulary_is_appended() -> None:
    first, second = Vocabulary.from_text("bd"), Vocabulary.from_text("abc\n\n", stop="\n\n")
    both = first.extend(second)
    assert both.tokens == ("", "[UNK]", "b", "d", "\n\n", "a", "c") and both.stop == "\n\n"


def test_unprintable_text_is_replaced_and_control_characters_are_escaped() -> None:
    assert make_printable(b"caf\xe9 \xc3\xa9".decode("utf-8", "surrogateescape")) == "caf\ufffd é"
    assert make_printable(f"a{FILE_END}b") == "a\n\nb"
    assert make_printable("\x1b[2J\0\a\x7f\x9b\r.") == "\\x1b[2J\\x00\\x07\\x7f\\x9b\r."
    assert make_printable("a\tb\r\nc\n") == "a\tb\r\nc\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"units": 3}, "does not hold"),
        ({"units": ["a", "b"]}, "first two"),
        ({"units": ["", "[UNK]", "a", "a"]}, "twice"),
        ({"units": ["", "[UNK]", 5]}, "must be text"),
        ({"units": ["", "[UNK]", "a\ud800"]}, "surrogates not allowed"),
        ({"kind": ["words"]}, "kind"),
        ({"stop": "b"}, "not among"),
        ({"stop": None}, "does not hold"),
    ],
)
def test_a_damaged_vocabulary_raises_an_error(
    changed: dict[str, object], message: str, tmp_path: Path
) -> None:
    fields = Vocabulary.from_text("a\n", stop="\n").to_fields()
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_fields(fields | changed)
    files.write_json(tmp_path / workdir.VOCABULARY, fields | changed)
    with pytest.raises(UserError, match=f"vocabulary.json is missing or damaged: .*{message}"):
        workdir.load_vocabulary(tmp_path)
