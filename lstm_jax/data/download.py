"""Download a file: resume an interrupted download, and verify it before it gets its name."""

import contextlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lstm_jax.run import files

_CHUNK_BYTES = 2**16
# Give up on a server that sends nothing for this time.
_TIMEOUT_SECONDS = 30
# Some servers refuse urllib's own name.
_HEADERS = {"User-Agent": "lstm-jax"}


class Download(NamedTuple):
    """A file at a public address."""

    address: str
    size: int  # In bytes.
    sha256: str

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


def _receive_rest(file: Download, part: Path, done: int) -> int:
    """Append what follows the first `done` bytes of a file, or write all of it again.

    Return the size, which is larger than that of the file if more than the file is sent.
    """
    with _network_errors():
        try:
            response = _request(file, done)
        except urllib.error.HTTPError as error:
            if not done or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            part.unlink()  # The file there is shorter.
            response = _request(file, 0)
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            done = 0
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
                with _network_errors():
                    chunk = response.read1(_CHUNK_BYTES)
                if not chunk:
                    break
                output.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    return done


def _request(file: Download, done: int) -> http.client.HTTPResponse:
    """Request what follows the first `done` bytes of a file; the server may send all of it."""
    headers = {**_HEADERS, "Range": f"bytes={done}-"} if done else _HEADERS
    request = urllib.request.Request(file.address, headers=headers)
    return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """Raise `DownloadError` for any error of the network or the server."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if type(error) is urllib.error.URLError else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise DownloadError(" ".join(reason.split())) from None
