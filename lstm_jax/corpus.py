"""Where text comes from: the user's own files or a TFDS dataset, as three splits."""

import contextlib
import glob
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from lstm_jax import tiny_shakespeare
from lstm_jax.errors import UserError, one_line
from lstm_jax.vocabulary import FILE_END

SPLITS = ("train", "validation", "test")
# In data.path, between the files of each split where they come apart.
_BETWEEN_SPLITS = ";"

# Its bars are for downloads of gigabytes; here they would bury what a command prints.
tfds.disable_progress_bar()


def read(data: ConfigDict) -> dict[str, str]:
    """The text of each split, as the `data` fields of a config say.

    With `data.units` "bytes", a byte that is no part of UTF-8 becomes a surrogate, as Python's
    "surrogateescape" has it. With `data.document_separator` "file", `FILE_END` stands after each
    file, or each example of a dataset.

    Raises:
      UserError: if a text is missing, not UTF-8, empty, or too short to be split.
    """
    options = {"any_bytes": data.units == "bytes", "ends": data.document_separator == "file"}
    if data.path:
        texts = [read_files(files, **options) for files in find_files(data.path)]
        if len(texts) == 1:
            splits = split(texts[0], data.fractions, any_bytes=data.units == "bytes")
        else:
            splits = dict(zip(SPLITS, texts, strict=True))
        source = data.path
    else:
        splits = read_dataset(
            data.dataset, data.text_feature, data.directory, data.fractions, **options
        )
        source = f"the dataset {data.dataset}"
    check_lengths({name: len(text) for name, text in splits.items()}, source)
    return splits


def check_lengths(characters: Mapping[str, int], source: str) -> None:
    """Raises `UserError` if a split of `source` has no token to read and one to predict."""
    for name, length in characters.items():
        if length < 2:
            raise UserError(f"{source} is too short: its {name} split has {length} characters")


def find_files(paths: str) -> list[list[Path]]:
    """The files that `data.path` names, in order: of the one text, or of each of the splits.

    Raises:
      UserError: if a file is missing, or there are neither one text nor three.
    """
    texts = paths.split(_BETWEEN_SPLITS)
    if len(texts) not in (1, 3):
        raise UserError(
            f"data.path {paths!r} is {len(texts)} texts: it must be one, or those of "
            f"train, validation and test with {_BETWEEN_SPLITS} between"
        )
    return [_find(text) for text in texts]


def _find(paths: str) -> list[Path]:
    """The files that paths or glob patterns, with commas between, name."""
    files: list[Path] = []
    for pattern in paths.split(","):
        # A name with brackets in it may be both a file and a pattern: the file is meant.
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"there is no text file {pattern}: name one that exists in data.path")
        files += [path for path in map(Path, found) if len(found) == 1 or path.is_file()]
    return files


def read_files(files: Sequence[Path], any_bytes: bool = False, ends: bool = False) -> str:
    """The text of all files, one after the other.

    Args:
      files: their paths.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.
      ends: whether `FILE_END` stands after each file.

    Raises:
      UserError: if a file can't be read, is empty or not UTF-8 (naming the byte that is not).
    """
    texts = [_read_file(path, any_bytes) for path in files]
    return _with_ends(texts) if ends else "".join(texts)


def _with_ends(texts: Sequence[str]) -> str:
    if any(FILE_END in text for text in texts):
        raise UserError("a file holds U+FDD0, which stands for the end of a file here: remove it")
    return "".join(text + FILE_END for text in texts)


def absolute(paths: str) -> str:
    """The same paths and patterns, good from any current directory."""

    def of_one(paths: str) -> str:
        return ",".join(str(Path(pattern).absolute()) for pattern in paths.split(","))

    return _BETWEEN_SPLITS.join(map(of_one, paths.split(_BETWEEN_SPLITS)))


def _read_file(path: Path, any_bytes: bool) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if not content:
        raise UserError(f"{path} is empty: data.path must name files with text in them")
    return decode(content, str(path), any_bytes, ", or learn its bytes with data.units=bytes")


def read_argument(path: str, flag: str, any_bytes: bool) -> str:
    """The text of the file that a command's flag names; "-" is standard input.

    Args:
      path: of the file.
      flag: the flag, to be told where the file can't be read.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.

    Raises:
      UserError: if it can't be read, or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path} ({flag}): {error.strerror}") from None
    return decode(content, f"{path} ({flag})", any_bytes)


def decode(content: bytes, name: str, any_bytes: bool, remedy: str = "") -> str:
    """The text of a file.

    Args:
      content: what is in it.
      name: what to call it where it is no text.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.
      remedy: what else could be done about a file that is no text.

    Raises:
      UserError: if it is not UTF-8, naming the byte that is not.
    """
    if any_bytes:
        return content.decode("utf-8", "surrogateescape")
    try:
        # A byte-order mark is no part of the text.
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {error.start}: convert it, for example with "
            f"iconv -f LATIN1 -t UTF-8{remedy}"
        ) from None


def split(text: str, fractions: Sequence[float], any_bytes: bool = False) -> dict[str, str]:
    """Cuts a text by position into train, validation and test.

    Each share is cut from what is left and rounded down, as TFDS does for Tiny Shakespeare.

    Args:
      text: the text.
      fractions: the shares.
      any_bytes: whether positions are those of bytes, as in the usual splits of enwik8. What is no
        UTF-8, like half a character at a cut, is kept as surrogates.
    """
    if any_bytes:
        # In Latin-1 every byte is one character.
        in_bytes = text.encode("utf-8", "surrogateescape").decode("latin-1")
        parts = split(in_bytes, fractions)
        return {
            name: part.encode("latin-1").decode("utf-8", "surrogateescape")
            for name, part in parts.items()
        }
    train, validation = cuts(len(text), fractions)
    return {"train": text[:train], "validation": text[train:validation], "test": text[validation:]}


def cuts(length: int, fractions: Sequence[float]) -> tuple[int, int]:
    """Where the validation and the test split begin in a text of this length."""
    train = int(length * fractions[0])
    return train, train + int((length - train) * (fractions[1] / (fractions[1] + fractions[2])))


def read_dataset(
    name: str,
    text_feature: str,
    directory: str,
    fractions: Sequence[float],
    any_bytes: bool = False,
    ends: bool = False,
) -> dict[str, str]:
    """The splits of a TFDS dataset, its examples joined by line breaks.

    A dataset that has no validation or test split of its own gets all three cut, by `fractions`,
    from the examples of its train split.

    Args:
      name: as TFDS knows it: "tiny_shakespeare", "wiki40b/en:1.3.0".
      text_feature: the feature that holds text.
      directory: TFDS's data directory; "" for its default.
      fractions: the shares of train, validation and test.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.
      ends: whether `FILE_END` stands after each example, instead of line breaks between them.

    Raises:
      UserError: if there is no such dataset or feature, or it can't be prepared without TensorFlow.
    """
    data_dir = Path(directory or tfds.core.constants.DATA_DIR).expanduser()
    builder = _open_builder(name, data_dir)
    if not builder.is_prepared():
        try:
            # TFDS tells its progress on standard output, which is for what a command was asked.
            with contextlib.redirect_stdout(sys.stderr):
                if name.partition(":")[0] == tiny_shakespeare.NAME:
                    tiny_shakespeare.prepare(data_dir)
                else:
                    builder.download_and_prepare()
        except ImportError as error:
            raise UserError(
                f"preparing {name} needs {error.name}, which is not here: prepare it as "
                f"array_record elsewhere and copy it to {data_dir}"
            ) from None
        except UserError:
            raise
        except Exception as error:  # A builder is code of the dataset's own: it can raise anything.
            reason = one_line(error)
            raise UserError(f"can't prepare {name} under {data_dir}: {reason}") from None
        builder = _open_builder(name, data_dir)
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    if text_feature not in texts:
        known = ", ".join(texts) or "none"
        raise UserError(f"{name} has no text {text_feature!r} (data.text_feature); it has {known}")
    if "train" not in builder.info.splits:
        raise UserError(f"{name} has no split named train to learn from")

    def text(split_name: str) -> str:
        source = builder.as_data_source(split=split_name)
        errors = "surrogateescape" if any_bytes else "strict"
        texts = [source[i][text_feature].decode("utf-8", errors) for i in range(len(source))]
        return _with_ends(texts) if ends else "\n".join(texts)

    if all(name in builder.info.splits for name in SPLITS):
        return {name: text(name) for name in SPLITS}
    return split(text("train"), fractions)


def _open_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"TFDS knows no dataset {name!r}: correct data.dataset") from None
    except ValueError as error:
        if "File format is already set" not in str(error):
            raise
        raise UserError(
            f"{name} is prepared under {data_dir} in a format that only TensorFlow reads: name "
            "another data.directory, and it is prepared there as array_record"
        ) from None


def checksum(splits: dict[str, str]) -> str:
    """SHA-256 over the bytes of all splits, in hexadecimal."""
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(splits[name].encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def check_unchanged(sha256: str, data: ConfigDict) -> None:
    """Raises `UserError` if the text is not the one that a run began with (`data.sha256`)."""
    if data.sha256 and data.sha256 != sha256:
        raise UserError(
            f"the text is not the one this run was trained on (SHA-256 {data.sha256} at that time, "
            f"{sha256} now): bring that text back, or train anew in another --workdir"
        )
