"""Texts of files and datasets: found, split as documented, read in pieces, and encoded."""

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import draws
from lstm_jax import config as config_lib
from lstm_jax.data import texts
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import workdir
from lstm_jax.vocabulary import FILE_END, KINDS, SEPARATORS, TextSize, Vocabulary, split_text

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Characters of 2, 3 and 4 bytes, combining marks, joined emoji, flags and both line breaks.
MANY = (
    "Καλημέρα κόσμε, e\u0301te\u0301 na\u00efve.\r\n\r\n日本語の文章です。\n\n\n"
    "👩\u200d👩\u200d👧 🇩🇪🇫🇷 ha-ha don't 3.14\n\r\n \u200dx  y\t"
)


def read_files(paths: str, **fields: Any) -> dict[str, str]:
    """Return the splits of files."""
    return texts.read_splits(config_lib.DataConfig(path=paths, **fields))


def test_tiny_shakespeare_is_complete_and_split_as_in_tfds(
    shakespeare: dict[str, str], tmp_path: Path
) -> None:
    sizes = {"train": 1_003_854, "validation": 55_770, "test": 55_770}
    assert {name: len(text) for name, text in shakespeare.items()} == sizes
    whole = "".join(shakespeare.values())
    assert hashlib.sha256(whole.encode()).hexdigest() == SHAKESPEARE_SHA256
    checksum = f"{SHAKESPEARE_SHA256}:1003854:55770:55770"
    packaged = workdir.load_config(workdir.find_model("tiny-shakespeare"))
    assert packaged.data.sha256 == checksum
    # A file with the same text is split at the same positions.
    (tmp_path / "text").write_text(whole)
    assert read_files(f"{tmp_path}/text") == shakespeare
    splits = texts.load_texts(config_lib.DataConfig(path=f"{tmp_path}/text"))
    assert splits["train"].checksum == checksum


def test_files_are_read_in_the_order_named_and_globs_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"b.txt": "zwei\r\n", "a.txt": "\ufeffeins ", "c[1].txt": "drei"}.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "e.txt").mkdir()
    for pattern in ("*.txt", "**/**/*.txt"):  # The latter matches each file twice.
        assert "".join(read_files(f"{tmp_path}/{pattern}").values()) == "eins zwei\r\ndrei"
    assert "".join(read_files(f"{tmp_path}/c[1].txt,{tmp_path}/a.txt").values()) == "dreieins "
    assert read_files(f"{tmp_path}/a.txt,{tmp_path}/b.txt;{tmp_path}/c*;{tmp_path}/c*") == {
        "train": "eins zwei\r\n",
        "validation": "drei",
        "test": "drei",
    }
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts.find_files("~/a.txt") == [[tmp_path / "a.txt"]]
    assert texts.make_absolute("~/a.txt;/b") == f"{tmp_path}/a.txt;/b"
    assert texts.read_argument("~/b.txt", "--text", "characters").read() == "zwei\r\n"


def test_the_names_of_directories_may_have_any_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "Smith, J; [x]"
    place.mkdir()
    (place / "a,b.txt").write_text("text")
    monkeypatch.chdir(place)
    for name in ("*.txt", "a[,]b.txt"):
        files = texts.find_files(texts.make_absolute(f"{name};{name},{name};{name}"))
        assert files == [[place / "a,b.txt"] * number for number in (1, 2, 1)]
    splits = {"train": texts.hold_text(b"", "characters")}
    data = texts.resolve_text(config_lib.DataConfig(directory="texts"), splits)
    assert data.directory == str(place / "texts")


def test_a_text_may_begin_with_white_space(tmp_path: Path) -> None:
    data = config_lib.default().data
    data.units, data.path = "tokens", f"{tmp_path}/a.txt;{tmp_path}/b.txt;{tmp_path}/b.txt"
    (tmp_path / "a.txt").write_bytes(b"12 13 14\n" * 9)
    (tmp_path / "b.txt").write_bytes(b"\r12 13 15\n")
    splits = texts.load_texts(data)
    vocabulary = splits["train"].make_vocabulary(data)
    for known, unknown in ((vocabulary, 4), (Vocabulary(["", "[UNK]", " 15"], "tokens"), 6)):
        _, sizes = texts.encode_splits(splits, known)
        assert sizes["test"] == TextSize(3, len(" 13 15\n"), unknown)


def test_an_error_names_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    for name, message in {
        "missing.txt": "no text file .*missing.txt",
        "gone*": "can't read .*gone.txt: No such file",
        "endless.txt": "can't read .*endless.txt: it is not a regular file",
        "": r"is a directory: name its files, for example .*[^/]/\*$",
        "a;b": "names 2 texts: it must name one, or three .train",
    }.items():
        with pytest.raises(UserError, match=message):
            read_files(f"{tmp_path}/{name}")


def test_each_file_or_example_is_a_document(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 30)
    text = "".join(read_files(f"{tmp_path}/*", document_separator="file").values())
    assert text == "a" * 30 + FILE_END + "b" * 30 + FILE_END
    splits = read_dataset("fables", tmp_path, document_separator="file")
    assert sorted("".join(splits).split(FILE_END)[:-1]) == sorted(f"story {i}" for i in range(50))


def test_a_text_is_split_at_the_first_byte_of_a_character(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + ("é€" * 50).encode() + bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(content)
    data = config_lib.DataConfig(path=f"{tmp_path}/file", units="bytes")
    parts = [x.encode("utf-8", "surrogateescape") for x in texts.read_splits(data).values()]
    checksum = [hashlib.sha256(content).hexdigest(), *(str(len(part)) for part in parts)]
    assert texts.load_texts(data)["train"].checksum == ":".join(checksum)
    assert b"".join(parts) == content
    assert len(parts[0]) == int(0.9 * len(content))
    # Byte 11 of 32 is the second one of a character; tokens of bytes may be split there.
    (tmp_path / "file").write_text("é" * 15 + "x" * 2)
    for units, size in (("characters", 12), ("bytes", 11)):
        splits = read_files(f"{tmp_path}/file", units=units, fractions=(0.35, 0.35, 0.3))
        train, *others = (x.encode("utf-8", "surrogateescape") for x in splits.values())
        assert len(train) == size and train + b"".join(others) == b"\xc3\xa9" * 15 + b"xx"
    for name in "abcd":  # But not within the end of a file.
        (tmp_path / f"{name}.txt").write_text(name * 97)
    for share in (0.745, 0.7475, 0.75):
        fields = {"fractions": (share, 0.95 - share, 0.05), "document_separator": "file"}
        splits = read_files(f"{tmp_path}/*.txt", units="bytes", **fields)
        assert sum(text.count(FILE_END) for text in splits.values()) == 4


# Datasets.


class Fables(tfds.core.GeneratorBasedBuilder):
    """A dataset with a train and a test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "title": tfds.features.Text(),
            "story": tfds.features.Text(),
            "pages": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(50), "test": self._generate_examples(5)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            yield i, {"title": f"t{i}", "story": f"story {i}", "pages": i}


class Unpreparable(Fables):
    """A dataset whose preparation fails."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise AssertionError("Download it\nby hand")


def read_dataset(name: str, directory: Path, feature: str = "story", **fields: Any) -> list[str]:
    """Return the splits of a dataset of TFDS."""
    data = config_lib.DataConfig(
        dataset=name, directory=str(directory), text_feature=feature, **fields
    )
    return list(texts.read_splits(data).values())


def test_any_tfds_dataset_with_a_text_feature(tmp_path: Path) -> None:
    splits = read_dataset("fables", tmp_path, fractions=(0.8, 0.1, 0.1))
    train = "".join(splits)
    # Without a validation split, all three splits come from the 50 training examples.
    assert sorted(train.split("\n")) == sorted(f"story {i}" for i in range(50))
    assert len(splits[0]) == int(0.8 * len(train))
    with pytest.raises(UserError, match="no text feature 'pages' .*title, story"):
        read_dataset("fables", tmp_path, "pages")


def test_an_error_says_why_a_dataset_is_not_read(tfds_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't prepare unpreparable .* Download it by hand"):
        read_dataset("unpreparable", tmp_path)
    with pytest.raises(UserError, match="no dataset 'no_such_thing'"):
        read_dataset("no_such_thing", tmp_path)
    shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
    (info,) = tmp_path.glob("tiny_shakespeare/*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match="can.t prepare tiny_shakespeare .*use another --config.data.directory"
    ):
        read_dataset("tiny_shakespeare", tmp_path)


# Ids.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the ids of every text to a file in this directory, a kilobyte of text at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "LARGE", 0)
    monkeypatch.setattr(texts, "_BLOCK", 701)
    monkeypatch.setattr(texts, "_BLOCK_BYTES", 1000)
    return tmp_path / "cache" / "lstm-jax" / "texts"


@pytest.fixture
def data(tmp_path: Path, shakespeare: dict[str, str], cache: Path) -> ConfigDict:
    """Return the config of three files."""
    (tmp_path / "text").mkdir()
    text = shakespeare["train"]
    for i, name in enumerate(("a", "b", "c")):
        mixed = "".join(text[k : k + 700] + MANY for k in range(i * 9000, i * 9000 + 7000, 700))
        content = ("\ufeff" if name == "b" else "") + mixed + MANY * 3
        (tmp_path / "text" / f"{name}.txt").write_bytes(content.encode())
    data = config_lib.default().data
    data.path = f"{tmp_path}/text/*.txt"
    return data


def measure(text: str, vocabulary: Vocabulary) -> TextSize:
    """Return the size of a text by its definition."""
    tokens = vocabulary.split(text)
    sizes = [len(x.encode("utf-8", "surrogateescape")) + 1 for x in tokens if x not in vocabulary]
    return TextSize(len(tokens), len(text), sum(sizes))


def assert_same(data: ConfigDict) -> None:
    """Assert that vocabulary, ids and sizes are those of the text as a whole."""
    splits = texts.load_texts(data)
    whole = texts.read_splits(data)
    train, stop = splits["train"], SEPARATORS[data.document_separator]
    vocabulary = Vocabulary.from_text(
        whole["train"], data.units, data.min_count, stop, data.vocabulary_size
    )
    assert train.make_vocabulary(data).to_fields() == vocabulary.to_fields()
    # The vocabulary of an earlier model, with tokens that are too rare in this text.
    known = Vocabulary.from_text("日本zebra 3.14 κόσμε, 👩\u200d👩\u200d👧" + stop, data.units)
    for encoder in (vocabulary, known.extend(vocabulary)):
        known_ids = {token: i for i, token in enumerate(encoder.tokens)}
        for name, text in splits.items():
            ids = text.encode(encoder)
            assert isinstance(ids, np.memmap) and ids.dtype in (np.uint8, np.uint16)
            expected = [known_ids.get(token, 1) for token in encoder.split(whole[name])]
            np.testing.assert_array_equal(ids, expected)
            counts = np.bincount(ids, minlength=len(encoder))
            np.testing.assert_array_equal(texts.count_ids(ids, len(encoder)), counts)
            first = encoder.split(whole[name])[0]
            if first.isascii():
                spelled = first if whole[name].startswith(first) else first.removeprefix(" ")
                of_first = measure(first, encoder)._replace(characters=len(spelled))
                of_whole = measure(whole[name], encoder)
                of_rest = (a - b for a, b in zip(of_whole, of_first, strict=True))
                assert text.measure(encoder, ids) == tuple(of_rest)


@pytest.mark.parametrize(
    ("units", "min_count", "separator"),
    [
        ("characters", 3, "blank_line"),
        ("words", 2, "blank_line"),
        ("words", 1, "file"),
        ("tokens", 2, "line"),
        ("bytes", 1, "file"),
        ("bpe", 2, ""),
    ],
)
def test_ids_are_those_of_the_whole_text(
    units: str, min_count: int, separator: str, data: ConfigDict
) -> None:
    data.units, data.min_count, data.document_separator = units, min_count, separator
    data.fractions = (0.61, 0.2, 0.19)
    assert_same(data)


def test_any_bytes(data: ConfigDict, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    (tmp_path / "text" / "b.txt").write_bytes(b"\x80" * 5000 + noise + b"\xe2\x82")
    data.units = "bytes"
    assert_same(data)


def test_a_text_is_encoded_once_for_each_vocabulary(
    data: ConfigDict, tmp_path: Path, cache: Path
) -> None:
    def encode(kind: str) -> None:
        data.units = kind
        splits = texts.load_texts(data)
        texts.encode_splits(splits, splits["train"].make_vocabulary(data))

    encode("characters")
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert sorted(path.name.split("-")[0] for path in times) == ["test", "train", "validation"]
    (tmp_path / "text").rename(tmp_path / "moved")
    data.path = f"{tmp_path}/moved/*.txt"
    encode("characters")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    encode("bytes")
    assert len(list(cache.iterdir())) == 6
    source = tmp_path / "moved" / "a.txt"
    before = source.read_bytes()
    source.write_bytes(before.replace(b"a", b"b", 1))
    encode("characters")
    assert len(list(cache.iterdir())) == 9
    # No part of a file is left where the text can't be read to its end.
    source.write_bytes(before + b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        encode("characters")
    assert len(list(cache.iterdir())) == 9
    source.write_bytes(before)
    shutil.rmtree(cache)
    cache.touch()
    with pytest.raises(UnavailableError, match=f"can't write the ids of the text to {cache}"):
        encode("characters")


@pytest.mark.usefixtures("cache")
def test_a_text_that_is_not_utf8_is_named(data: ConfigDict, tmp_path: Path) -> None:
    for content, place in ((b"x" * 5000 + b"caf\xe9 x", 5003), (b"\xef\xbb\xbfab\xe2\x82", 5)):
        (tmp_path / "text" / "b.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"b.txt is not UTF-8 at byte {place}: "):
            texts.read_splits(data)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30 * draws.TIMES)
@given(
    pieces=st.lists(
        st.sampled_from([*"ab '\n\r\t\u3000é日👩🇩\u0301\u200d", "b ", "xxxxxxxx", " y"]),
        min_size=1,
        max_size=60,
    ),
    size=st.integers(1, 24),
    stop=st.sampled_from(["", "\n", "\n\n"]),
)
def test_pieces_of_any_size_have_the_tokens_of_the_text(
    kind: str, pieces: list[str], size: int, stop: str
) -> None:
    whole = "".join(pieces)
    # A source is read as one piece.
    content = whole.encode()
    source = texts.hold_text(content, kind)
    places = [i for i, byte in enumerate(content) if byte & 0xC0 != 0x80]
    bounds = itertools.pairwise([*places[::size], len(content)])
    opener = source.sources[0].open
    cut = source._replace(sources=[texts.Source("", opener, *pair) for pair in bounds])
    blocks = list(cut.read_blocks())
    assert "".join(blocks) == whole
    tokens = [token for piece in blocks for token in split_text(piece, kind, stop)]
    assert tokens == list(split_text(whole, kind, stop))
    assert all(any(split_text(piece, kind, stop)) for piece in blocks[:-1])
