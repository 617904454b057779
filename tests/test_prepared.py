import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import commands
import draws
import runs
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import training
from lstm_jax.data import encoding, prepared, sources, texts
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import workdir
from lstm_jax.run.resume import extend_vocabulary
from lstm_jax.vocabulary import KINDS, Vocabulary, split_text

_run_processes = prepared._run_processes

# Characters of 2, 3 and 4 bytes, combining marks, joined emoji, flags and both line breaks.
MANY = (
    "Καλημέρα κόσμε, e\u0301te\u0301 na\u00efve.\r\n\r\n日本語の文章です。\n\n\n"
    "👩\u200d👩\u200d👧 🇩🇪🇫🇷 ha-ha don't 3.14\n\r\n \u200dx  y\t"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lstm-jax" / "prepared"


@pytest.fixture
def data(
    tmp_path: Path, shakespeare: dict[str, str], encoded_here: None, monkeypatch: pytest.MonkeyPatch
) -> ConfigDict:
    """Return the config of three files, to be prepared here in chunks of a kilobyte."""
    monkeypatch.setattr(prepared, "CHUNK", 1000)
    monkeypatch.setattr(prepared, "_BLOCKS", 3)
    monkeypatch.setattr(prepared, "_PIECE", 701)
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


def load_in_memory(data: ConfigDict) -> texts.Splits:
    """Return the same texts, read into memory."""
    data = data.copy_and_resolve_references()
    data.memory_megabytes = 16
    return texts.load_texts(data)


def assert_same(data: ConfigDict) -> None:
    """Assert that vocabulary, ids, size, text and checksum equal those of the text in memory."""
    ours, theirs = texts.load_texts(data), load_in_memory(data)
    assert isinstance(ours.texts["train"], prepared.PreparedText)
    assert ours.sha256 == theirs.sha256
    vocabulary = theirs.texts["train"].make_vocabulary(data)
    assert ours.texts["train"].make_vocabulary(data).to_fields() == vocabulary.to_fields()
    # The vocabulary of an earlier model, with tokens that are too rare in this text.
    known = Vocabulary.from_text(
        "日本zebra 3.14 κόσμε, 👩\u200d👩\u200d👧" + vocabulary.stop, data.units
    )
    for encoder in (vocabulary, extend_vocabulary(known, vocabulary)):
        for name, text in theirs.texts.items():
            ids, expected = ours.texts[name].encode(encoder), text.encode(encoder)
            assert len(ids) == len(expected)
            np.testing.assert_array_equal(ids[:], expected)
            np.testing.assert_array_equal(ids[7:90], expected[7:90])
            np.testing.assert_array_equal(ids[len(ids) - 1 :], expected[-1:])
            assert len(ids[90:90]) == len(ids[len(ids) :]) == 0
            rows = np.array([[len(ids) // 2], [0], [len(ids) - 40]]) + np.arange(40)
            np.testing.assert_array_equal(ids[rows], expected[rows])
            for first in (True, False):
                assert ours.texts[name].get_size(encoder, first) == text.get_size(encoder, first)
    for name, text in theirs.texts.items():
        start, whole = ours.texts[name].read_start(), text.read_start()
        assert len(start) >= min(len(whole), 500)
        # In bytes, because the last character may be incomplete.
        spelled, of_start = (x.encode("utf-8", "surrogateescape") for x in (whole, start))
        assert spelled.startswith(of_start)


@pytest.mark.parametrize(
    ("units", "min_count", "separator"),
    [
        ("characters", 3, "blank_line"),
        ("words", 1, "line"),
        ("words", 2, "blank_line"),
        ("words", 1, "file"),
        ("bytes", 1, "file"),
        ("bpe", 2, ""),
    ],
)
def test_ids_match_those_of_the_text_in_memory(
    units: str, min_count: int, separator: str, data: ConfigDict
) -> None:
    data.units, data.min_count, data.document_separator = units, min_count, separator
    data.fractions = (0.61, 0.2, 0.19)
    assert_same(data)


@pytest.mark.process
def test_several_processes_encode_a_text(data: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_run_processes", _run_processes)
    assert_same(data)


def test_splits_in_separate_files(data: ConfigDict, tmp_path: Path) -> None:
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


@pytest.mark.process
def test_mistakes_in_several_processes_give_one_error(
    data: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(prepared, "_run_processes", _run_processes)
    (tmp_path / "text" / "b.txt").write_bytes(b"caf\xe9 " * 5000)
    with pytest.raises(UserError, match="b.txt is not UTF-8 at byte"):
        texts.load_texts(data)
    assert "Traceback" not in capfd.readouterr().err


def test_mistakes_give_the_same_errors_as_in_memory(data: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "text" / "b.txt").write_bytes(b"x" * 5000 + b"caf\xe9 x" + b"y" * 50)
    with pytest.raises(UserError, match="b.txt is not UTF-8 at byte 5003"):
        texts.load_texts(data)
    (tmp_path / "text" / "b.txt").write_text("x\ufdd0y")
    data.document_separator = "file"
    with pytest.raises(UserError, match="b.txt holds U\\+FDD0"):
        texts.load_texts(data)
    for empty in ("", "\ufeff"):
        (tmp_path / "text" / "b.txt").write_text(empty, encoding="utf-8")
        with pytest.raises(UserError, match="b.txt is empty"):
            texts.load_texts(data)
    data.document_separator = ""
    (tmp_path / "text" / "b.txt").write_text("xyz")
    data.path = f"{tmp_path}/text/b.txt"
    with pytest.raises(UserError, match="validation split has 0 characters"):
        texts.load_texts(data)


def test_a_corpus_is_prepared_again_only_if_its_text_changes(
    data: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def preparations() -> int:
        texts.load_texts(data)
        return capsys.readouterr().err.count("Preparing")

    assert preparations() == 1 and preparations() == 0
    os.utime(tmp_path / "text" / "a.txt", ns=(1, 1))
    assert preparations() == 0
    # Move text and corpus together.
    (tmp_path / "text").rename(tmp_path / "moved")
    data.path = f"{tmp_path}/moved/*.txt"
    assert preparations() == 0
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    data.path = f"{tmp_path}/copied/*.txt"
    assert preparations() == 0
    data.path = f"{tmp_path}/moved/*.txt"
    # Change the text, but not its size and time.
    source = tmp_path / "moved" / "c.txt"
    content, before = source.read_bytes(), source.stat()
    source.write_bytes(content.replace(b"e", b"E", 1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert preparations() == 1
    source.write_bytes(content)
    assert preparations() == 1
    source = tmp_path / "moved" / "a.txt"
    source.write_bytes(source.read_bytes().replace(b"a", b"b", 1))
    data.sha256 = "0" * 64
    with pytest.raises(UserError, match="not the one this run was trained on"):
        texts.load_texts(data)
    data.sha256 = ""
    capsys.readouterr()
    assert preparations() == 1 and preparations() == 0
    # Flip one bit of the ids.
    (ids,) = tmp_path.glob("moved/.lstm_jax/*/train.npy")
    damaged, before = bytearray(ids.read_bytes()), ids.stat()
    damaged[5000] ^= 1
    ids.write_bytes(damaged)
    os.utime(ids, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert preparations() == 1
    data.prepared = str(tmp_path / "elsewhere")
    assert preparations() == 1
    assert len(list((tmp_path / "elsewhere").glob("a-*/prepared.json"))) == 1
    assert_same(data)


@pytest.mark.process
def test_a_killed_preparation_leaves_nothing(data: ConfigDict, tmp_path: Path) -> None:
    script = f"""
from lstm_jax import config
from lstm_jax.data import prepared, texts
prepared.CHUNK = 100
data = config.default().data
data.path, data.memory_megabytes = {data.path!r}, 0
texts.load_texts(data)
"""
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    process = subprocess.Popen(command, stderr=pipe, text=True)

    def is_under_way() -> bool:
        return len(list(tmp_path.glob("text/.lstm_jax/.*/parts/*.npz"))) >= 5

    commands.wait_until(is_under_way, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("text/.lstm_jax/*/prepared.json")), "no corpus looks complete"
    time.sleep(0.5)  # The worker processes end at their next chunk.
    result = commands.run_python("-c", script)
    assert result.returncode == 0, result.stderr
    (corpus,) = tmp_path.glob("text/.lstm_jax/*/")
    assert not (corpus / prepared._PARTS).exists()
    assert_same(data)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized", "encoded_here")
def test_training_is_the_same_from_memory_and_from_files(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.max_steps = 20
    tiny_config.data.prepared = str(tmp_path / "prepared")
    assert training.train(tiny_config, tmp_path / "memory") == 0
    tiny_config.data.memory_megabytes = 0
    assert training.train(tiny_config, tmp_path / "files") == 0
    # Batches that are cut on the device use another program than those from the host.
    runs.assert_same(tmp_path / "memory", tmp_path / "files", rtol=1e-6)
    trained = workdir.load_trained(tmp_path / "files")
    ids = texts.load_texts(trained.config.data).texts["train"].encode(trained.vocabulary)
    whole = trained.vocabulary.encode(Path(tiny_config.data.path).read_text()[:18_000])
    np.testing.assert_array_equal(ids[:], whole)
    monkeypatch.setattr(loss_lib, "LONGEST_IN_ONE", 20_000)
    expected = loss_lib.compute_loss(trained.model, trained.params, whole)
    assert loss_lib.compute_loss(trained.model, trained.params, ids) == pytest.approx(expected)
    # A long text is evaluated in parallel streams, with almost the same loss.
    monkeypatch.setattr(loss_lib, "LONGEST_IN_ONE", 1500)
    monkeypatch.setattr(loss_lib, "_STREAMS", 3)
    monkeypatch.setattr(loss_lib, "_WARM_UP", 200)
    side_by_side = loss_lib.compute_loss(trained.model, trained.params, ids)
    assert side_by_side != expected and side_by_side == pytest.approx(expected, rel=1e-3)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


MANIFESTS: dict[str, Callable[[Path], Any]] = {
    "no field": lambda path: path.write_bytes(b"{}"),
    "a list": lambda path: path.write_bytes(b"[]"),
    "no JSON": lambda path: path.write_bytes(b"\xff"),
    "nested": lambda path: path.write_bytes(b"[" * 60_000),
    "endless": sparse,
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
}


def test_a_corpus_with_a_damaged_manifest_is_ignored(
    prepared_once: tuple[ConfigDict, Path],
) -> None:
    data, directory = prepared_once
    path = directory / prepared.MANIFEST
    manifest = path.read_bytes()
    for name, make in MANIFESTS.items():
        path.unlink()
        make(path)
        assert prepared.find_corpus(data) is None, name
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(manifest)
        assert prepared.find_corpus(data)
    path.write_bytes(manifest.replace(b'"stop": ""', b'"stop": "a"'))
    assert prepared.find_corpus(data) is None


@pytest.fixture
def prepared_once(data: ConfigDict) -> tuple[ConfigDict, Path]:
    """Return the config of a prepared text, and the directory of its corpus."""
    return data, prepared.prepare_corpus(data).directory


def test_the_recorded_directory_has_no_tilde(
    prepared_once: tuple[ConfigDict, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    data, _ = prepared_once
    data = config_lib.DataConfig(**{**data, "prepared": "~/corpora"})
    resolved = texts.Splits({}, "0" * 64).resolve(data)
    assert resolved.prepared == "/home/somebody/corpora"


def test_a_file_that_changes_while_it_is_read_raises_an_error(
    prepared_once: tuple[ConfigDict, Path],
) -> None:
    data, directory = prepared_once
    text = prepared.open_splits(prepared.prepare_corpus(data))["train"]
    ids = text.encode(text.make_vocabulary(data))
    path = directory / "train.npy"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    windows = np.array([[0], [3]]) + np.arange(5)
    np.testing.assert_array_equal(ids[windows], [ids[:5], ids[3:8]])
    for read in (lambda: ids[:], lambda: ids[np.array([[0], [len(ids) - 3]]) + np.arange(3)]):
        with pytest.raises(UserError, match="train.npy has changed while it was read"):
            read()
    path.write_bytes(b"\xff" * size)
    with pytest.raises(UserError, match="train.npy has changed while it was read"):
        ids[:9]
    manifest = prepared.prepare_corpus(data)
    (manifest.directory / "counts.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged: remove it"):
        prepared.open_splits(manifest)


@pytest.mark.slow
def test_nothing_is_written_through_links(
    prepared_once: tuple[ConfigDict, Path], tmp_path: Path
) -> None:
    data, directory = prepared_once
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "file").write_text("precious, too")

    def is_untouched() -> bool:
        written = {path.name: path.read_text() for path in folder.iterdir()}
        return victim.read_text() == "precious" and written == {"file": "precious, too"}

    lock = directory.with_name(f".{directory.name}.lock")
    shutil.rmtree(directory)
    directory.symlink_to(folder)
    assert_same(data)
    assert is_untouched() and not directory.is_symlink()

    for name in (prepared.MANIFEST, "train.npy"):
        (directory / name).unlink()
        (directory / name).symlink_to(victim)
        assert prepared.find_corpus(data) is None
        assert_same(data)
        assert is_untouched()
    shutil.rmtree(directory)
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(UnavailableError, match="can't prepare .*It is a link"):
        prepared.prepare_corpus(data)
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UnavailableError, match="can't prepare .*not a regular file"):
        prepared.prepare_corpus(data)
    lock.unlink()
    base = directory.parent
    base.rmdir()
    base.symlink_to(folder)
    with pytest.raises(UserError, match="lstm_jax is a link: set data.prepared to"):
        prepared.prepare_corpus(data)
    assert is_untouched()
    data.prepared = str(base)  # The user may name the link.
    prepared.prepare_corpus(data)
    assert len(list(folder.glob("a-*/prepared.json"))) == 1


def test_a_full_disk_raises_an_unavailable_error(
    data: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "CHUNK", 2**20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UnavailableError, match="can't prepare the text in .* too large.*space"):
            prepared.prepare_corpus(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(data)
    data.prepared = str(tmp_path / "text" / "a.txt")
    with pytest.raises(UnavailableError, match="can't prepare the text in .*a.txt"):
        prepared.prepare_corpus(data)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30 * draws.TIMES)
@given(
    pieces=st.lists(
        st.sampled_from([*"ab '\n\r\t\u3000é日👩🇩\u0301\u200d", "b ", "xxxxxxxx", " y"]),
        min_size=1,
        max_size=60,
    ),
    size=st.integers(5, 24),
    stop=st.sampled_from(["", "\n", "\n\n"]),
)
def test_chunks_of_any_size_have_the_ids_of_the_text(
    kind: str, pieces: list[str], size: int, stop: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join(pieces)
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    path.write_bytes(text.encode())
    found = [
        (chunk, b"".join(map(sources.read_segment, chunk)))
        for chunk in encoding.cut_text(sources.list_segments([path], False, False), kind, size)
    ]
    assert b"".join(content for _, content in found) == text.encode()
    tokens: list[str] = []
    for chunk, content in found:
        decoded = sources.read_segments(chunk, kind == "bytes")
        assert decoded.encode("utf-8", "surrogateescape") == content
        part = encoding.encode_chunk(decoded, kind, stop)
        tokens += [list(part.tokens)[i] for i in part.ids.tolist()]
    assert tokens == list(split_text(text, kind, stop))


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_a_cut_at_the_end_of_a_chunk(kind: str, tmp_path: Path) -> None:
    # The letter after the space is in the next 20 bytes. The rest after the cut is then longer than
    # a chunk.
    text = "x" * 19 + " " + "y" * 60
    (tmp_path / "text").write_text(text)
    text_segments = sources.list_segments([tmp_path / "text"], False, False)
    found = encoding.cut_text(text_segments, kind, 20)
    assert [sources.read_segments(chunk, False) for chunk in found] == ["x" * 19, " " + "y" * 60]
