"""Test that files and datasets are read, split and checked."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lstm_jax import config as config_lib
from lstm_jax.data import sources, texts
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.vocabulary import FILE_END

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_dataset(name: str, directory: Path, feature: str = "story", **fields: Any) -> list[str]:
    """Return the splits of a dataset of TFDS."""
    data = config_lib.DataConfig(
        dataset=name, directory=str(directory), text_feature=feature, **fields
    )
    return list(texts.read_splits(data).values())


def read_files(paths: list[Path]) -> str:
    """Return the text of files, one after the other."""
    return "".join(sources.read_text(sources.list_segments(paths, False, ends=False), False))


def test_tiny_shakespeare_is_complete_and_split_as_in_tfds(
    shakespeare: dict[str, str], tmp_path: Path
) -> None:
    assert {name: len(text) for name, text in shakespeare.items()} == {
        "train": 1_003_854,
        "validation": 55_770,
        "test": 55_770,
    }
    joined = "".join(shakespeare.values())
    assert hashlib.sha256(joined.encode()).hexdigest() == SHAKESPEARE_SHA256
    checksum = f"{SHAKESPEARE_SHA256}:1003854:55770:55770"
    packaged = workdir.load_config(workdir.find_model("tiny-shakespeare"))
    assert packaged.data.sha256 == checksum
    # A file with the same text is split at the same positions.
    (tmp_path / "text").write_text(joined)
    data = config_lib.default().data
    data.path = str(tmp_path / "text")
    assert texts.read_splits(data) == shakespeare
    assert texts.load_texts(data).sha256 == checksum


def test_files_are_read_in_the_order_named_and_globs_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"b.txt": "zwei\r\n", "a.txt": "\ufeffeins ", "c[1].txt": "drei"}.items():
        (tmp_path / name).write_bytes(text.encode())
    for pattern in ("*.txt", "**/**/*.txt"):  # The latter matches each file twice.
        (files,) = sources.find_files(f"{tmp_path}/{pattern}")
        assert read_files(files) == "eins zwei\r\ndrei"
    (files,) = sources.find_files(f"{tmp_path}/c[1].txt,{tmp_path}/a.txt")
    assert read_files(files) == "dreieins "
    with pytest.raises(UserError, match="/a.txt is in the training text and in another split"):
        sources.find_files(";".join(f"{tmp_path}/{name}.txt" for name in "*ab"))
    with pytest.raises(UserError, match="/a.txt is named twice"):
        sources.find_files(f"{tmp_path}/*.txt,{tmp_path}/a.txt")
    (tmp_path / "d.txt").symlink_to("gone")
    (tmp_path / "e.txt").mkdir()
    names = [path.name for path in sources.find_files(f"{tmp_path}/*.txt")[0]]
    assert names == ["a.txt", "b.txt", "c[1].txt", "d.txt"], "a link to nothing is an error later"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.find_files("~/a.txt") == [[tmp_path / "a.txt"]]
    assert sources.make_absolute("~/a.txt") == f"{tmp_path}/a.txt"


def test_each_file_or_example_is_a_document(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 30)
    config = config_lib.default()
    config.data.path = f"{tmp_path}/*"
    config.data.document_separator = "file"
    text = "".join(texts.read_splits(config.data).values())
    assert text == "a" * 30 + FILE_END + "b" * 30 + FILE_END
    splits = read_dataset("fables", tmp_path, document_separator="file")
    assert sorted("".join(splits).split(FILE_END)[:-1]) == sorted(f"story {i}" for i in range(50))


def test_an_error_names_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "latin.txt").write_bytes("plain, then caf\u00e9".encode("latin-1"))
    for name, message in {
        "missing.txt": "no text file .*missing.txt",
        "empty.txt": "empty.txt is empty",
        "mark.txt": "mark.txt is empty",
        "latin.txt": "latin.txt is not UTF-8 at byte 15",
        "": r"is a directory: name its files, for example .*[^/]/\*$",
    }.items():
        with pytest.raises(UserError, match=message):
            read_files([path for text in sources.find_files(f"{tmp_path}/{name}") for path in text])


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


def test_any_tfds_dataset_with_a_text_feature(tmp_path: Path) -> None:
    splits = read_dataset("fables", tmp_path, fractions=(0.8, 0.1, 0.1))
    train = "".join(splits)
    # Without a validation split, all three splits come from the 50 training examples.
    assert sorted(train.split("\n")) == sorted(f"story {i}" for i in range(50))
    assert len(splits[0]) == int(0.8 * len(train))
    with pytest.raises(UserError, match="no text feature 'text' .*title, story"):
        read_dataset("fables", tmp_path, "text")
    with pytest.raises(UserError, match="no text feature 'pages' .*title, story"):
        read_dataset("fables", tmp_path, "pages")


class Unpreparable(Fables):
    """A dataset whose preparation fails."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise AssertionError("Download it\nby hand")


def test_a_failed_dataset_preparation_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't prepare unpreparable .* Download it by hand"):
        read_dataset("unpreparable", tmp_path)


def test_an_error_names_an_unknown_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset 'no_such_thing'"):
        read_dataset("no_such_thing", tmp_path)


def test_a_dataset_prepared_for_tensorflow_raises_an_error(tfds_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
    (info,) = tmp_path.glob("tiny_shakespeare/*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"only TensorFlow reads: use another data.directory"):
        read_dataset("tiny_shakespeare", tmp_path)


def test_each_split_may_have_its_own_files(tmp_path: Path) -> None:
    for name, text in (("a", "train"), ("b", "ing"), ("c", "valid"), ("d", "test")):
        (tmp_path / name).write_text(text)
    data = config_lib.default().data
    data.path = f"{tmp_path}/a,{tmp_path}/b;{tmp_path}/c;{tmp_path}/d"
    assert sources.make_absolute(data.path) == data.path
    assert texts.read_splits(data) == {"train": "training", "validation": "valid", "test": "test"}
    data.path = f"{tmp_path}/a;{tmp_path}/b"
    with pytest.raises(UserError, match="names 2 texts: it must name one, or three .train"):
        texts.read_splits(data)


def test_no_split_of_bytes_begins_within_the_end_of_a_file(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name * 97)
    data = config_lib.default().data
    data.path, data.units, data.document_separator = f"{tmp_path}/*.txt", "bytes", "file"
    for train in (0.745, 0.7475, 0.75):
        data.fractions = (train, 0.95 - train, 0.05)
        splits = texts.read_splits(data)
        assert sum(text.count(FILE_END) for text in splits.values()) == 4


def test_a_text_of_bytes_is_split_at_byte_offsets(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + ("é€" * 50).encode() + bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(content)
    data = config_lib.default().data
    data.path, data.units = str(tmp_path / "file"), "bytes"
    splits = texts.read_splits(data)
    parts = [text.encode("utf-8", "surrogateescape") for text in splits.values()]
    checksum = [hashlib.sha256(content).hexdigest(), *(str(len(part)) for part in parts)]
    assert texts.load_texts(data).sha256 == ":".join(checksum)
    assert b"".join(parts) == content
    assert len(parts[0]) == int(0.9 * len(content))
    # A split in the middle of a two-byte character.
    (tmp_path / "file").write_text("é" * 10)
    data.fractions = (0.45, 0.25, 0.3)
    train = texts.read_splits(data)["train"]
    assert len(train.encode("utf-8", "surrogateescape")) == 9
