import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from lstm_jax import config as config_lib
from lstm_jax import encoding, evaluate, prepared, texts, train, workdir
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Vocabulary, split

# Two, three and four bytes a character; marks, joined emoji, flags and line breaks of both kinds.
MANY = (
    "Καλημέρα κόσμε, e\u0301te\u0301 na\u00efve.\r\n\r\n日本語の文章です。\n\n\n"
    "👩\u200d👩\u200d👧 🇩🇪🇫🇷 ha-ha don't 3.14\n\r\n \u200dx  y\t"
)


@pytest.fixture
def data(
    tmp_path: Path, shakespeare: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> ConfigDict:
    """Three files, to be prepared in chunks of a kilobyte, in a directory of their own."""
    monkeypatch.setattr(encoding, "CHUNK", 1000)
    (tmp_path / "text").mkdir()
    text = shakespeare["train"]
    for i, name in enumerate(("a", "b", "c")):
        mixed = "".join(text[k : k + 700] + MANY for k in range(i * 9000, i * 9000 + 7000, 700))
        content = ("\ufeff" if name == "b" else "") + mixed + MANY * 3
        (tmp_path / "text" / f"{name}.txt").write_bytes(content.encode())
    data = config_lib.default().data
    data.path = f"{tmp_path}/text/*.txt"
    data.memory_megabytes = 0
    return data


def in_memory(data: ConfigDict) -> texts.Splits:
    """The same texts, read the other way."""
    data = data.copy_and_resolve_references()
    data.memory_megabytes = 16
    return texts.read(data)


def assert_same(data: ConfigDict) -> None:
    """Vocabulary, ids, costs, text and checksum are those of the text in memory."""
    ours, theirs = texts.read(data), in_memory(data)
    assert isinstance(ours.texts["train"], prepared.PreparedText)
    assert ours.sha256 == theirs.sha256
    vocabulary = theirs.texts["train"].vocabulary(data)
    assert ours.texts["train"].vocabulary(data).to_json() == vocabulary.to_json()
    # A model that knew other units before, some of them too rare in this text.
    known = Vocabulary.from_text(
        "日本zebra 3.14 κόσμε, 👩\u200d👩\u200d👧" + vocabulary.stop, data.units
    )
    for encoder in (vocabulary, known.extended(vocabulary)):
        for name, text in theirs.texts.items():
            ids, expected = ours.texts[name].encode(encoder), text.encode(encoder)
            assert len(ids) == len(expected)
            np.testing.assert_array_equal(ids[:], expected)
            np.testing.assert_array_equal(ids[7:90], expected[7:90])
            for first in (True, False):
                assert ours.texts[name].costs(encoder, first) == text.costs(encoder, first)
    for name, text in theirs.texts.items():
        assert "".join(ours.texts[name].pieces(0)) == "".join(text.pieces(0))
        tail = ""
        for piece in ours.texts[name].pieces(30):
            assert piece.startswith(tail)
            tail = piece[-30:]


@pytest.mark.parametrize(
    ("units", "min_count", "separator"),
    [
        ("characters", 1, ""),
        ("characters", 3, "blank_line"),
        ("graphemes", 1, "line"),
        ("words", 2, ""),
        ("words", 2, "blank_line"),
        ("words", 1, "file"),
        ("bytes", 1, "blank_line"),
        ("bytes", 1, "file"),
    ],
)
def test_ids_are_those_of_the_text_in_memory(
    units: str, min_count: int, separator: str, data: ConfigDict
) -> None:
    data.units, data.min_count, data.document_separator = units, min_count, separator
    data.fractions = (0.61, 0.2, 0.19)
    assert_same(data)


def test_splits_in_files_of_their_own(data: ConfigDict, tmp_path: Path) -> None:
    data.path = ";".join(f"{tmp_path}/text/{name}.txt" for name in "abc")
    data.units = "words"
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


@pytest.mark.parametrize("units", ["characters", "graphemes", "words"])
def test_a_text_is_cut_only_where_its_units_come_apart(units: str) -> None:
    rng = np.random.default_rng(1)
    alphabet = [*"ab.'1é日👩🇩 ", " ", "\n", "\r", "\r\n", "\u0301", "\u200d"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet, 40))
        content = text.encode()
        stop = str(rng.choice(["", "\n\n", "\n", "\r\n\r\n"]))
        at = encoding.last_cut(content, units)
        parts = [content[:at].decode(), content[at:].decode()]
        joined = [unit for part in parts for unit in split(part, units, stop)]
        assert joined == list(split(text, units, stop)), (text, at)


def test_mistakes_are_told_as_in_memory(data: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "text" / "b.txt").write_bytes(b"x" * 5000 + b"caf\xe9 x" + b"y" * 50)
    with pytest.raises(UserError, match="b.txt is not UTF-8 at byte 5003"):
        texts.read(data)
    (tmp_path / "text" / "b.txt").write_text("x\ufdd0y")
    data.document_separator = "file"
    with pytest.raises(UserError, match="a file holds U\\+FDD0"):
        texts.read(data)
    (tmp_path / "text" / "b.txt").write_text("")
    with pytest.raises(UserError, match="b.txt is empty"):
        texts.read(data)
    data.document_separator = ""
    (tmp_path / "text" / "b.txt").write_text("xyz")
    data.path = f"{tmp_path}/text/b.txt"
    with pytest.raises(UserError, match="validation split has 0 characters"):
        texts.read(data)


def test_a_corpus_is_made_again_only_if_its_text_is_another(
    data: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def preparations() -> int:
        texts.read(data)
        return capsys.readouterr().err.count("Preparing")

    assert preparations() == 1 and preparations() == 0
    os.utime(tmp_path / "text" / "a.txt", ns=(1, 1))
    assert preparations() == 0
    # Text and corpus, moved together.
    (tmp_path / "text").rename(tmp_path / "moved")
    data.path = f"{tmp_path}/moved/*.txt"
    assert preparations() == 0
    source = tmp_path / "moved" / "a.txt"
    source.write_bytes(source.read_bytes().replace(b"a", b"b", 1))
    data.sha256 = "0" * 64
    with pytest.raises(UserError, match="not the one this run was trained on"):
        texts.read(data)
    data.sha256 = ""
    capsys.readouterr()
    assert preparations() == 1 and preparations() == 0
    # One bit of the ids.
    (ids,) = tmp_path.glob("moved/.lstm_jax/*/train.npy")
    damaged = bytearray(ids.read_bytes())
    damaged[5000] ^= 1
    ids.write_bytes(damaged)
    assert preparations() == 1
    data.prepared = str(tmp_path / "elsewhere")
    assert preparations() == 1
    assert len(list((tmp_path / "elsewhere").glob("a-*/prepared.json"))) == 1
    assert_same(data)


def test_a_killed_preparation_goes_on(data: ConfigDict, tmp_path: Path) -> None:
    script = f"""
from lstm_jax import config, encoding, texts
encoding.CHUNK = 100
data = config.default().data
data.path, data.memory_megabytes = {data.path!r}, 0
texts.read(data)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(found := sorted(tmp_path.glob("text/.lstm_jax/*.unfinished/parts/*.npz"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("text/.lstm_jax/*/prepared.json")), "nothing looks whole"
    time.sleep(0.5)  # The processes of the killed one end at their next chunk.
    parts = sorted(tmp_path.glob("text/.lstm_jax/*.unfinished/parts/*.npz"))
    assert len(parts) >= len(found)
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("text/.lstm_jax/*.unfinished"))
    assert_same(data)


def test_what_is_encoded_of_the_same_plan_is_kept(tmp_path: Path) -> None:
    plan = {"sha256": "1", "chunks": []}
    prepared._begin(tmp_path / "work", plan)
    path = encoding.part_path(tmp_path / "work", 0)
    part = encoding.encode("text", "characters", "")
    encoding.save_part(path, part)
    prepared._begin(tmp_path / "work", plan)
    kept = encoding.load_part(path)
    assert kept is not None and (kept.units, kept.characters) == (part.units, 4)
    path.write_bytes(path.read_bytes()[:-30])
    assert encoding.load_part(path) is None, "half a part is none"
    prepared._begin(tmp_path / "work", {**plan, "sha256": "2"})
    assert not path.exists()


def test_training_is_the_same_from_memory_and_from_files(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.num_epochs = 1
    tiny_config.data.prepared = str(tmp_path / "prepared")
    assert train.train(tiny_config, tmp_path / "memory") == 0
    tiny_config.data.memory_megabytes = 0
    assert train.train(tiny_config, tmp_path / "files") == 0
    # Batches that are cut on the device are part of another program than those that are fed.
    runs.assert_same(tmp_path / "memory", tmp_path / "files", rtol=1e-6)
    trained = workdir.load(tmp_path / "files")
    splits = texts.read_again(trained.config.data, None)
    ids = texts.Joined([splits[name].encode(trained.vocabulary) for name in ("validation", "test")])
    whole = trained.vocabulary.encode(Path(tiny_config.data.path).read_text()[18_000:])
    np.testing.assert_array_equal(ids[:], whole)
    np.testing.assert_array_equal(ids[900:1100], whole[900:1100])
    expected = evaluate.mean_loss(trained.model, trained.params, whole)
    assert evaluate.mean_loss(trained.model, trained.params, ids) == pytest.approx(expected)
    # A long text, side by side: all but the same.
    monkeypatch.setattr(evaluate, "LONGEST_IN_ONE", 1500)
    monkeypatch.setattr(evaluate, "_STREAMS", 3)
    monkeypatch.setattr(evaluate, "_WARM_UP", 200)
    side_by_side = evaluate.mean_loss(trained.model, trained.params, ids)
    assert side_by_side != expected and side_by_side == pytest.approx(expected, rel=1e-3)
