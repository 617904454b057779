"""Test that a text is read in pieces, encoded into memory or a file, and split as documented."""

import itertools
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import training
from lstm_jax.data import files, sources, texts
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import workdir
from lstm_jax.run.resume import extend_vocabulary
from lstm_jax.vocabulary import KINDS, TextSize, Vocabulary, split_text

# Characters of 2, 3 and 4 bytes, combining marks, joined emoji, flags and both line breaks.
MANY = (
    "Καλημέρα κόσμε, e\u0301te\u0301 na\u00efve.\r\n\r\n日本語の文章です。\n\n\n"
    "👩\u200d👩\u200d👧 🇩🇪🇫🇷 ha-ha don't 3.14\n\r\n \u200dx  y\t"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the ids of every text to a file in this directory, a kilobyte of text at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "LARGE", 0)
    monkeypatch.setattr(texts, "_BLOCK", 701)
    monkeypatch.setattr(sources, "_PIECE_BYTES", 1000)
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
    train = splits.texts["train"]
    vocabulary = Vocabulary.from_text(
        whole["train"], data.units, data.min_count, train.stop, data.vocabulary_size
    )
    assert train.make_vocabulary(data).to_fields() == vocabulary.to_fields()
    # The vocabulary of an earlier model, with tokens that are too rare in this text.
    known = Vocabulary.from_text(
        "日本zebra 3.14 κόσμε, 👩\u200d👩\u200d👧" + train.stop, data.units
    )
    for encoder in (vocabulary, extend_vocabulary(known, vocabulary)):
        for name, text in splits.texts.items():
            ids = text.encode(encoder)
            assert isinstance(ids, np.memmap) and ids.dtype in (np.uint8, np.uint16)
            np.testing.assert_array_equal(ids, encoder.look_up(encoder.split(whole[name])))
            expected = measure(whole[name], encoder)
            assert text.measure(encoder, ids, first=True) == expected
            counts = np.bincount(ids, minlength=len(encoder))
            np.testing.assert_array_equal(texts.count_ids(ids, len(encoder)), counts)
            first = encoder.split(whole[name])[0]
            if first.isascii():
                of_first = measure(first, encoder)
                of_rest = (a - b for a, b in zip(expected, of_first, strict=True))
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


def test_any_bytes_and_windows_line_breaks(data: ConfigDict, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    (tmp_path / "text" / "b.txt").write_bytes(b"\x80" * 5000 + noise + b"\xe2\x82")
    data.units = "bytes"
    assert_same(data)
    (tmp_path / "text" / "b.txt").write_bytes(b"one\r\ntwo\r\n\r\n" * 400)
    data.units, data.document_separator = "characters", "blank_line"
    data.path = f"{tmp_path}/text/b.txt"
    assert_same(data)


def test_a_text_is_encoded_once_for_each_vocabulary(
    data: ConfigDict, tmp_path: Path, cache: Path
) -> None:
    def encode(kind: str) -> None:
        data.units = kind
        splits = texts.load_texts(data)
        splits.encode(splits.texts["train"].make_vocabulary(data))

    encode("characters")
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert sorted(path.name.split("-")[0] for path in written) == ["test", "train", "validation"]
    (tmp_path / "text").rename(tmp_path / "moved")
    data.path = f"{tmp_path}/moved/*.txt"
    encode("characters")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    encode("bytes")
    assert len(list(cache.iterdir())) == 6
    source = tmp_path / "moved" / "a.txt"
    source.write_bytes(source.read_bytes().replace(b"a", b"b", 1))
    encode("characters")
    assert len(list(cache.iterdir())) == 9


def test_a_file_of_ids_gets_its_name_when_it_is_complete(
    data: ConfigDict, tmp_path: Path, cache: Path
) -> None:
    text = texts.load_texts(data).texts["train"]
    vocabulary = text.make_vocabulary(data)
    expected = text.encode(vocabulary).tolist()
    (path,) = cache.iterdir()
    path.unlink()
    # What a killed process leaves.
    part = path.with_suffix(".part")
    part.write_bytes(b"unfinished" * 10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UnavailableError, match="can't write the ids .* too large.*XDG_CACHE"):
            text.encode(vocabulary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists() and part.stat().st_size == 0
    # Two processes: the second waits for the first.
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(text.encode(vocabulary).tolist()))
        for _ in range(2)
    ]
    with part.open("ab") as file:
        files.lock_file(file)
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert found == [] and not path.exists()
    for thread in threads:
        thread.join()
    assert found == [expected] * 2
    assert list(cache.iterdir()) == [path]


def test_a_text_that_is_not_utf8_is_named(data: ConfigDict, tmp_path: Path, cache: Path) -> None:
    for content, place in ((b"x" * 5000 + b"caf\xe9 x", 5003), (b"\xef\xbb\xbfab\xe2\x82", 5)):
        (tmp_path / "text" / "b.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"b.txt is not UTF-8 at byte {place}: "):
            texts.read_splits(data)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_training_is_the_same_from_memory_and_from_a_file(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.max_steps = 20
    assert training.train(tiny_config, tmp_path / "memory") == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "LARGE", 500)
    assert training.train(tiny_config, tmp_path / "file") == 0
    assert len(list((tmp_path / "cache" / "lstm-jax" / "texts").iterdir())) == 3
    # Batches that are cut on the device use another program than those from the host.
    runs.assert_same(tmp_path / "memory", tmp_path / "file", rtol=1e-6)
    trained = workdir.load_trained(tmp_path / "file")
    ids = texts.load_texts_of_run(trained.config.data)["train"].encode(trained.vocabulary)
    monkeypatch.setattr(loss_lib, "LONGEST_IN_ONE", 20_000)
    expected = loss_lib.compute_loss(trained.model, trained.params, ids)
    # A long text is evaluated in parallel streams, with almost the same loss.
    monkeypatch.setattr(loss_lib, "LONGEST_IN_ONE", 1500)
    monkeypatch.setattr(loss_lib, "_STREAMS", 3)
    monkeypatch.setattr(loss_lib, "_WARM_UP", 200)
    side_by_side = loss_lib.compute_loss(trained.model, trained.params, ids)
    assert side_by_side != expected and side_by_side == pytest.approx(expected, rel=1e-3)


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
    held = texts.hold_text(whole, kind, stop)
    found = list(held._replace(segments=cut(held.segments, size)).read_pieces())
    assert "".join(found) == whole
    tokens = [token for piece in found for token in split_text(piece, kind, stop)]
    assert tokens == list(split_text(whole, kind, stop))


def cut(segments: list[sources.Segment], size: int) -> list[sources.Segment]:
    """Cut a text in memory, which is otherwise read as one piece, between characters."""
    (segment,) = segments
    assert isinstance(segment.source, bytes)
    places = [i for i, byte in enumerate(segment.source) if byte & 0xC0 != 0x80]
    bounds = [*places[::size], len(segment.source)]
    return [sources.Segment(segment.source, *pair) for pair in itertools.pairwise(bounds)]
