"""Where text comes from: the user's own files or a TFDS dataset, as three splits."""

import fnmatch
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lstm_jax.errors import UserError
from lstm_jax.run import files
from lstm_jax.vocabulary import FILE_END

SPLITS = ("train", "validation", "test")
# In data.path, between the files of each split where they come apart.
_BETWEEN_SPLITS = ";"
# Files and directories that the patterns of a data.path look at together. One from someone else
# could name the whole disk.
_MOST_ENTRIES = 10**6
# Bytes of a file that a command's flag names.
_LARGEST_ARGUMENT = 10**9


def read_corpus(data: ConfigDict) -> dict[str, str]:
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
            splits = split_by_position(texts[0], data.fractions, any_bytes=data.units == "bytes")
        else:
            splits = dict(zip(SPLITS, texts, strict=True))
        source = data.path
    else:
        from lstm_jax.data import datasets  # Only where it is needed: TFDS takes long to import.

        splits = datasets.read_dataset(
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
      UserError: if a file is missing, there are neither one text nor three, or patterns look at
        too many files.
    """
    texts = paths.split(_BETWEEN_SPLITS)
    if len(texts) not in (1, 3):
        raise UserError(
            f"data.path {paths!r} is {len(texts)} texts: it must be one, or those of "
            f"train, validation and test with {_BETWEEN_SPLITS} between"
        )
    looks = _looks()
    return [_find(text, looks) for text in texts]


def _looks() -> Iterator[None]:
    """Yields once for each file or directory that may be looked at, and then raises."""
    yield from itertools.repeat(None, _MOST_ENTRIES)
    raise UserError(
        f"the patterns of data.path look at more than {_MOST_ENTRIES:,} files and directories: "
        "name narrower ones"
    )


def _find(paths: str, looks: Iterator[None]) -> list[Path]:
    """The files that paths or glob patterns, with commas between, name."""
    named: list[Path] = []
    for pattern in paths.split(","):
        # A name with brackets in it may be both a file and a pattern: the file is meant.
        found = [pattern] if os.path.exists(pattern) else sorted(_expand(pattern, looks))
        if os.path.isdir(pattern):
            inside = Path(pattern, "*")
            raise UserError(f"{pattern} is a directory: name its files in data.path: {inside}")
        found = [path for path in found if len(found) == 1 or os.path.isfile(path)]
        if not found:
            raise UserError(f"there is no text file {pattern}: name one that exists in data.path")
        named += map(Path, found)
    return named


def _expand(pattern: str, looks: Iterator[None]) -> list[str]:
    """Return what `glob.glob(pattern, recursive=True)` does, within a number of looks."""
    found = ["/" if pattern.startswith("/") else ""]
    for part in re.split("/+", pattern.lstrip("/")):
        parents, found = found, []
        for parent in parents:
            if part == "**":
                below = [os.path.join(parent, "")] if os.path.isdir(parent or ".") else []
                for path in below:  # It grows meanwhile.
                    below += [os.path.join(path, n) for n in _names(path, looks) if n[0] != "."]
                found += below
            elif set(part) & set("*?["):
                names = fnmatch.filter(_names(parent, looks), part)
                hidden = part.startswith(".")
                found += [os.path.join(parent, n) for n in names if hidden or n[0] != "."]
            else:
                next(looks)
                path = os.path.join(parent, part)
                found += [path] if os.path.lexists(path) else []
    return [path for path in found if path]


def _names(directory: str, looks: Iterator[None]) -> list[str]:
    """The names in a directory; none if it can't be read or is no directory."""
    try:
        with os.scandir(directory or ".") as entries:
            return [entry.name for entry, _ in zip(entries, looks, strict=False)]
    except (OSError, ValueError):
        return []


def read_files(paths: Sequence[Path], any_bytes: bool = False, ends: bool = False) -> str:
    """The text of all files, one after the other.

    Args:
      paths: of the files.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.
      ends: whether `FILE_END` stands after each file.

    Raises:
      UserError: if a file can't be read, is empty or not UTF-8 (naming the byte that is not).
    """
    texts = [_read_file(path, any_bytes) for path in paths]
    return join_with_ends(texts) if ends else "".join(texts)


def join_with_ends(texts: Sequence[str]) -> str:
    """The texts joined, `FILE_END` after each; raises `UserError` if one holds it already."""
    if any(FILE_END in text for text in texts):
        raise UserError("a file holds U+FDD0, which stands for the end of a file here: remove it")
    return "".join(text + FILE_END for text in texts)


def make_absolute(paths: str) -> str:
    """The same paths and patterns, good from any current directory."""

    def of_one(paths: str) -> str:
        return ",".join(str(Path(pattern).absolute()) for pattern in paths.split(","))

    return _BETWEEN_SPLITS.join(map(of_one, paths.split(_BETWEEN_SPLITS)))


def _read_file(path: Path, any_bytes: bool) -> str:
    try:
        with files.open_regular(path, follow=True) as file:
            # No more than its size, by which it was decided to read it into memory.
            content = file.read(os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if not content:
        raise UserError(f"{path} is empty: data.path must name files with text in them")
    return decode_text(content, str(path), any_bytes, ", or learn its bytes with data.units=bytes")


def read_argument(path: str, flag: str, any_bytes: bool) -> str:
    """The text of the file that a command's flag names; "-" is standard input.

    Args:
      path: of the file.
      flag: the flag, to be told where the file can't be read.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.

    Raises:
      UserError: if it can't be read, is larger than a gigabyte, or is not UTF-8.
    """
    try:
        if path == "-":
            content = sys.stdin.buffer.read(_LARGEST_ARGUMENT + 1)
        else:
            content = files.read_bytes(Path(path), _LARGEST_ARGUMENT, follow=True)
    except OSError as error:
        raise UserError(f"can't read {path} ({flag}): {error.strerror}") from None
    if len(content) > _LARGEST_ARGUMENT:
        raise UserError(f"can't read {path} ({flag}): it is larger than a gigabyte")
    return decode_text(content, f"{path} ({flag})", any_bytes)


def decode_text(content: bytes, name: str, any_bytes: bool, remedy: str = "") -> str:
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


def split_by_position(
    text: str, fractions: Sequence[float], any_bytes: bool = False
) -> dict[str, str]:
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
        parts = split_by_position(in_bytes, fractions)
        return {
            name: part.encode("latin-1").decode("utf-8", "surrogateescape")
            for name, part in parts.items()
        }
    train, validation = find_cuts(len(text), fractions)
    return {"train": text[:train], "validation": text[train:validation], "test": text[validation:]}


def find_cuts(length: int, fractions: Sequence[float]) -> tuple[int, int]:
    """Where the validation and the test split begin in a text of this length."""
    train = int(length * fractions[0])
    return train, train + int((length - train) * (fractions[1] / (fractions[1] + fractions[2])))


def compute_checksum(splits: dict[str, str]) -> str:
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
