"""Test the standard texts with small ones in their place, on a server of this machine."""

import contextlib
import dataclasses
import hashlib
import io
import random
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lstm_jax import config as config_lib
from lstm_jax import user_cache
from lstm_jax.data import download, files, standard_texts, texts
from lstm_jax.data.download import Download
from lstm_jax.data.standard_texts import STANDARD_TEXTS, StandardText
from lstm_jax.errors import UnavailableError, UserError

ROOT = Path(__file__).parents[1]


class Server(ThreadingHTTPServer):
    """A server of files.

    Attributes:
      contents: the files, by name.
      ranges: whether it can send the rest of a file only, and refuses to send none of it.
      sized: whether it says how much it sends.
      stop_at: the byte of a file where it stops sending, or None.
      dripped: what it sends without end: instead of an answer, or after the content of a file.
      location: where it redirects every request to, or "".
      requests: name and range of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents: dict[str, bytes] = {}
        self.ranges, self.sized = True, True
        self.stop_at: int | None = None
        self.dripped, self.location = b"", ""
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def add(self, name: str, content: bytes) -> Download:
        """Serve a file; return its download."""
        self.contents[name] = content
        address = f"http://127.0.0.1:{self.server_port}/{name}"
        return Download(address, len(content), hashlib.sha256(content).hexdigest())


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.strip("/"), self.headers["Range"]
        self.server.requests.append((name, wanted))
        if self.server.location:
            self.send_response(302)
            self.send_header("Location", self.server.location)
            self.end_headers()
            return
        if self.server.dripped.startswith(b"HTTP"):
            self.drip()
            return
        if name not in self.server.contents:
            self.send_error(404)
            return
        content, start = self.server.contents[name], 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if self.server.sized:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.stop_at])
        if self.server.dripped:
            self.drip()

    def drip(self) -> None:
        """Send the same bytes until the server closes."""
        with contextlib.suppress(OSError):
            while not self.server.closing.wait(0.02):
                self.wfile.write(self.server.dripped)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
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
    data = standard_texts.find_standard_text(make_data(directory, name))
    return [Path(path).read_bytes() for path in data.path.split(";")]


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
    assert server.requests == [("enwik8.zip", None)], "once"


def test_the_data_directory_can_be_a_link(
    archive: Download, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    assert b"".join(get_splits(tmp_path / "data")) == content


def test_a_user_without_a_home_directory_must_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match="no home directory: name another"):
        standard_texts.find_standard_text(config_lib.DataConfig(directory="~/texts"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(UserError, match="no home directory: set XDG_CACHE_HOME"):
        user_cache.get_path("texts")
    assert user_cache.make_directory("compiled") is None


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
    assert [name for name, _ in server.requests[1:]] == ["0.txt", "1.txt", "2.txt", "2.txt"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_ends_early_is_resumed(
    archive: Download, content: bytes, server: Server, ranges: bool, tmp_path: Path
) -> None:
    server.stop_at, server.ranges = 40_000, ranges
    with pytest.raises(UserError, match="ended after 40,000 of 1.*same call again") as error:
        get_splits(tmp_path)
    assert "\n" not in str(error.value)
    assert list_files(tmp_path) == {"enwik8.zip.part"}
    server.stop_at = None
    assert b"".join(get_splits(tmp_path)) == content
    assert server.requests == [("enwik8.zip", None), ("enwik8.zip", "bytes=40000-")]
    assert list_files(tmp_path) == {"enwik8", "enwik8.zip"}


def test_with_a_part_longer_than_the_file_all_is_requested(
    archive: Download, content: bytes, server: Server, tmp_path: Path
) -> None:
    server.stop_at = 40_000
    with pytest.raises(UserError, match="ended after 40,000"):
        get_splits(tmp_path)
    right = server.contents["enwik8.zip"]
    server.stop_at, server.contents["enwik8.zip"] = None, right[:30_000]
    with pytest.raises(UserError, match=f"it has 30,000 bytes there instead of {archive.size:,}"):
        get_splits(tmp_path)
    assert [wanted for _, wanted in server.requests] == [None, "bytes=40000-", None]
    assert list_files(tmp_path) == {"enwik8.zip.part"}
    server.contents["enwik8.zip"] = right
    assert b"".join(get_splits(tmp_path)) == content


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("added", [-1000, 0, 10**6])
def test_another_file_is_not_kept(
    archive: Download, content: bytes, server: Server, added: int, sized: bool, tmp_path: Path
) -> None:
    right = server.contents["enwik8.zip"]
    server.contents["enwik8.zip"] = random.Random(1).randbytes(archive.size + added)
    server.sized = sized
    message = "SHA-256 is .* instead of"
    if added and (sized or added < 0):
        message = f"has {archive.size + added:,} bytes there instead of" if sized else "ended after"
    with pytest.raises(UserError, match=message):
        get_splits(tmp_path)
    server.contents["enwik8.zip"] = right
    if message == "ended after":  # The rest of the right file does not fit.
        with pytest.raises(UserError, match="SHA-256 is .* instead of"):
            get_splits(tmp_path)
    assert list_files(tmp_path) == set()
    assert b"".join(get_splits(tmp_path)) == content


@pytest.mark.parametrize(
    "address",
    [
        *("ftp://127.0.0.1/x", "http://[x/", f"http://{'a' * 70}/", "http://a..b/", "http:///x"),
        *("http://\xe9.localhost/", "http://127.0.0.1:port/"),
    ],
)
def test_a_redirect_to_an_odd_address_is_one_line(
    address: str, archive: Download, server: Server, tmp_path: Path
) -> None:
    server.location = address
    with pytest.raises(UserError, match="can't download .*same call again") as error:
        get_splits(tmp_path)
    assert "\n" not in str(error.value) and list_files(tmp_path) == set()


@pytest.mark.parametrize("dripped", [b"x", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_slow_download_is_given_up(
    dripped: bytes,
    archive: Download,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    slow = STANDARD_TEXTS["enwik8"]._replace(downloads=(archive._replace(seconds=0.5),))
    monkeypatch.setitem(STANDARD_TEXTS, "enwik8", slow)
    monkeypatch.setattr(download, "_LEAST_SPEED", 10**6)
    server.dripped, server.stop_at = dripped, 500
    began = time.monotonic()
    with pytest.raises(UserError, match=r"\(the server is too slow.*same call again"):
        get_splits(tmp_path)
    assert time.monotonic() - began < 20
    assert list_files(tmp_path) <= {"enwik8.zip.part"}


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
    with pytest.raises(UserError, match="Connection refused.*same call again"):
        get_splits(tmp_path)
    assert list_files(tmp_path) == set()
    path = tmp_path / "enwik8.zip"
    path.write_bytes(b"another")
    with pytest.raises(UserError, match=f"is a different file: .*{archive.sha256}"):
        get_splits(tmp_path)
    assert path.read_bytes() == b"another", "a file of the user is not removed"
    path.write_bytes(right)
    assert b"".join(get_splits(tmp_path)) == content


def test_an_incomplete_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "enwik8").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/enwik8 is not complete: remove it"):
        get_splits(tmp_path)


@pytest.mark.parametrize("name", ["a,b", "a;b"])
def test_a_directory_that_separates_paths_raises_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a comma or semicolon is in"):
        get_splits(tmp_path / name)
    assert not list(tmp_path.iterdir())


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
    with files.open_append(tmp_path / ".lstm_jax.lock") as lock:
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


def test_a_file_of_the_same_name_has_another_field(
    archive: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("enwik8").write_bytes(b"my own file" * 10)
    data = make_data(tmp_path / "data")
    assert texts.load_texts(data).sha256.endswith(":90000:5000:5000")
    data = dataclasses.replace(data, path="enwik8")
    assert standard_texts.find_standard_text(data) is data
    assert texts.read_splits(data)["train"].startswith("my own file")


def test_a_run_finds_its_text_again(archive: Download, tmp_path: Path) -> None:
    splits = texts.load_texts(make_data(tmp_path / "data"))
    data = dataclasses.replace(make_data(tmp_path / "gone"), sha256=splits.sha256)
    again = texts.load_texts_of_run(data, directory=str(tmp_path / "data"))
    assert again == splits.texts and not (tmp_path / "gone").exists()
    with pytest.raises(UserError, match="not the one this run was trained on"):
        texts.load_texts(dataclasses.replace(data, sha256="0", directory=str(tmp_path / "data")))
