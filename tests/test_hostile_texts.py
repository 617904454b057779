"""Test that reading the text of a run from someone else is safe and has bounded cost."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import user_cache
from lstm_jax.data import datasets, prepared, sources, texts
from lstm_jax.data.encoding import Text
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Vocabulary


@pytest.fixture(autouse=True)
def in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop a test that hangs, and give each test its own cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def data() -> ConfigDict:
    return config_lib.default().data


def load_texts_of_run(data: ConfigDict, *arguments: str | None) -> dict[str, Text]:
    return texts.load_texts_of_run(config_lib.DataConfig(**data), *arguments)


def list_files(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


@pytest.fixture
def hostile_directory(tmp_path: Path, tfds_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a data directory whose datasets import a module that writes a file."""
    (tmp_path / "lib").mkdir()
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'imported')!r}).touch()"
    (tmp_path / "lib" / "hostile_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    (source,) = tfds_dir.glob("tiny_shakespeare/*")
    for name, version in [
        ("mine", "1.0.0"),
        ("tiny_shakespeare", "1.0.0"),
        (source.parent.name, "9.9.9"),
    ]:
        directory = tmp_path / "tfds" / name / version
        directory.mkdir(parents=True)
        for path in source.iterdir():
            target = directory / path.name.replace("tiny_shakespeare", name)
            target.write_bytes(path.read_bytes())
        info = json.loads((directory / "dataset_info.json").read_text())
        info |= {"name": name, "version": version}
        (directory / "dataset_info.json").write_text(json.dumps(info))
        features = json.loads((directory / "features.json").read_text())
        features["pythonClassName"] = "hostile_module.Features"
        (directory / "features.json").write_text(json.dumps(features))
    return tmp_path / "tfds"


def test_no_module_that_a_run_names_is_imported(
    data: ConfigDict, hostile_directory: Path, tmp_path: Path
) -> None:
    data.directory = str(hostile_directory)
    for name in ("mine", "mine:1.0.0", "tiny_shakespeare:9.9.9", "huggingface:x/y", "", "a b"):
        data.dataset = name
        with pytest.raises(UserError, match="if you trust it, add --dataset NAME") as e:
            load_texts_of_run(data, None)
        assert "\n" not in str(e.value) and "--data_directory" in str(e.value)
        # The directory alone does not allow it.
        with pytest.raises(UserError, match="--dataset NAME"):
            load_texts_of_run(data, None, None, str(hostile_directory))
    assert not (tmp_path / "imported").exists()
    # TFDS opens a dataset that the user names, and imports its modules.
    with pytest.raises(UserError, match="can't open the dataset 'mine'"):
        load_texts_of_run(data, None, "mine", str(hostile_directory))
    assert (tmp_path / "imported").exists()


def test_tiny_shakespeare_is_read_from_the_directory_of_the_user(
    data: ConfigDict,
    hostile_directory: Path,
    data_dir: Path,
    tmp_path: Path,
    shakespeare: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    before = list_files(hostile_directory)
    for directory in (hostile_directory, tmp_path / "new", "~nobody", "\0", "/dev/null"):
        data.directory = str(directory)
        read = load_texts_of_run(data, None)
        assert {name: text.read_start() for name, text in read.items()} == shakespeare
    assert list_files(hostile_directory) == before and not (tmp_path / "new").exists()
    assert not (tmp_path / "imported").exists()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    read = load_texts_of_run(data, None, None, str(data_dir))
    assert read["test"].read_start() == shakespeare["test"]
    read = load_texts_of_run(data, None, "tiny_shakespeare", str(data_dir))
    assert read["test"].read_start() == shakespeare["test"]


def test_a_huge_text_raises_an_error_before_it_is_read(data: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "huge.txt"
    with path.open("wb") as file:
        file.truncate(2**37)
    data.path, data.prepared = str(path), str(tmp_path / "text" / "prepared")
    data.memory_megabytes = 2**31
    small = tmp_path / "text" / "small.txt"
    small.write_text("x" * 1000)
    many = ",".join([str(small)] * 16_001)
    for named in (str(path), f"{many};{path};{path}", f"{path};{small};{small}"):
        data.path = named
        with pytest.raises(UserError, match="larger than 16 MB .* name it with --data_path FILE"):
            load_texts_of_run(data, None)
    assert list_files(tmp_path / "text") == [str(path), str(small)]


@pytest.mark.usefixtures("encoded_here")
def test_a_large_text_is_prepared_in_the_cache_if_the_user_names_it(
    data: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_MAX_BYTES_IN_MEMORY", 500)
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "a.txt"
    path.write_text("To be, or not to be: " * 50)
    data.path, data.prepared = str(path), str(tmp_path / "prepared")
    expected = texts.read_splits(data)
    data.sha256 = texts.compute_checksum(expected)
    with pytest.raises(
        UserError, match=f"--data_path FILE.*{user_cache.get_path('prepared').absolute()}"
    ):
        load_texts_of_run(data, None)
    for named in (str(path), None):  # Once it is prepared, its name can be left out.
        read = load_texts_of_run(data, named)
        assert isinstance(read["train"], prepared.PreparedText)
        assert {name: text.read_start() for name, text in read.items()} == expected
    assert list_files(tmp_path / "text") == [str(path)] and not (tmp_path / "prepared").exists()
    data.sha256 = ""  # So the file could be any one.
    with pytest.raises(UserError, match=r"no checksum of its text, .*: name it \(--data_path\)"):
        load_texts_of_run(data, None)
    # A corpus that was prepared for training is read in place, and nothing is written there.
    data.fractions = (0.8, 0.1, 0.1)
    data.memory_megabytes = 0
    expected = {name: text.read_start() for name, text in texts.load_texts(data).texts.items()}
    data.sha256 = texts.compute_checksum(expected)
    os.utime(path)
    before = {path: path.read_bytes() for path in (tmp_path / "prepared").rglob("*.json")}
    read = load_texts_of_run(data, None)
    assert {name: text.read_start() for name, text in read.items()} == expected
    assert {path: path.read_bytes() for path in before} == before and len(before) == 1
    # Another text raises an error.
    data.sha256 = "0" * 64
    with pytest.raises(UserError, match="not the one this run was trained on"):
        load_texts_of_run(data, str(path))


@pytest.fixture
def special(tmp_path: Path) -> list[str]:
    """Return paths that are not regular files."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    names = ("pipe", "directory", "link")
    return ["/dev/zero", "/dev/tty", *(str(tmp_path / name) for name in names)]


@pytest.mark.parametrize("megabytes", [0, 16])
def test_a_text_must_be_a_regular_file(
    megabytes: int, data: ConfigDict, special: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("To be, or not to be: " * 50)
    data.memory_megabytes = megabytes
    for path in special:
        for named in (path, f"{path},{tmp_path}/text"):
            data.path = named
            with pytest.raises(
                UserError,
                match="can't read .*(not a regular file|No such dev)|is a directory: name",
            ):
                texts.load_texts(data)
            with pytest.raises(UserError, match="can't read |is a directory: name"):
                load_texts_of_run(data, None)
        for any_bytes in (False, True):
            with pytest.raises(UserError, match=r"can't read .* \(--text\): "):
                sources.read_argument(path, "--text", any_bytes)
    # A link to a text is a text.
    (tmp_path / "linked").symlink_to("text")
    data.path, data.memory_megabytes = str(tmp_path / "linked"), 16
    assert texts.load_texts(data).texts["train"].read_start().startswith("To be")
    assert sources.read_argument(str(tmp_path / "linked"), "--text", False).startswith("To be")


@pytest.mark.slow
def test_the_size_of_arguments_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"can't read .*huge \(--prompt_file\): .* larger than"):
        sources.read_argument(str(tmp_path / "huge"), "--prompt_file", False)
    monkeypatch.setattr(sources, "_MAX_ARGUMENT_BYTES", 5)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ROMEO")))
    assert sources.read_argument("-", "--prompt_file", False) == "ROMEO"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ROMEO:")))
    with pytest.raises(UserError, match=r"can't read - \(--prompt_file\): it is larger"):
        sources.read_argument("-", "--prompt_file", False)


def test_invalid_paths_raise_an_error(data: ConfigDict, tmp_path: Path) -> None:
    for path in ("\0", "a\0*", "\ud800", "x" * 10**5, "*/" * 5000, "~nobody/x", "[", "", ","):
        data.path = path or ","
        for read in (lambda: texts.load_texts(data), lambda: load_texts_of_run(data, None)):
            with pytest.raises(UserError, match="there is no text file"):
                read()
    (tmp_path / "a").write_text("To be, or not to be: " * 50)
    data.path = str(tmp_path / "a")
    for directory in ("\0", "\ud800", "~nobody", "x" * 10**5, "/dev/null", "/proc/1"):
        data.prepared = directory
        assert prepared.find_corpus(data) is None


@pytest.mark.parametrize("name", ["a,b", "a;b", "[x]", "plain"])
def test_a_run_in_a_directory_of_any_name_finds_its_text_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.txt").write_text("a text")
    monkeypatch.chdir(tmp_path / name)
    for path in ("1.txt", "*.txt"):
        (found,) = sources.find_files(sources.make_absolute(path))
        assert [file.resolve() for file in found] == [tmp_path / name / "1.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("a b", "x/y/z", "tiny_shakespeare:9.9.9", "tiny_shakespeare/x", "tiny_shakespeare:*"),
        *("", ".", "../x", "x" * 5000, "a\0b", "\ud800", "kaggle:x", "a/b=c", "/etc"),
    ],
)
def test_an_invalid_dataset_name_gives_a_one_line_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.dataset") as error:
        datasets.read_dataset(config_lib.DataConfig(dataset=name, directory=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_damaged_dataset_is_read_or_gives_a_one_line_error(
    tfds_dir: Path, shakespeare: dict[str, str], tmp_path: Path
) -> None:
    (source,) = tfds_dir.glob("tiny_shakespeare/*")
    changes = {
        "features.json": b"[",
        "dataset_info.json": b"{}",
        "tiny_shakespeare-train.array_record-00000-of-00001": b"x" * 70_000,
    }
    for number, (changed, content) in enumerate(changes.items()):
        directory = tmp_path / str(number) / "tiny_shakespeare" / source.name
        directory.mkdir(parents=True)
        for path in source.iterdir():
            (directory / path.name).write_bytes(
                content if path.name == changed else path.read_bytes()
            )
        try:
            data = config_lib.DataConfig(directory=str(tmp_path / str(number)))
            assert datasets.read_dataset(data) == list(shakespeare.values())
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("bytes", ["\ud800", "é", "ab", "\udc79"]),
        ("characters", ["\ud800", "\udc80"]),
        ("words", ["a\ud800"]),
    ],
)
def test_tokens_of_another_kind_raise_an_error(kind: str, tokens: list[str]) -> None:
    for token in tokens:
        for given in ([token], kind), ([token + "\ud800"], kind, token + "\ud800"):
            with pytest.raises(ValueError, match=f"must be one of the {kind}"):
                Vocabulary(["", "[UNK]", "a", *given[0]], *given[1:])
