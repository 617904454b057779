"""Find, split and read the files of a text.

`any_bytes`, an argument of several functions, is whether the tokens are bytes: then bytes that are
not UTF-8 become surrogates, as in Python's "surrogateescape". Otherwise they are an error, and a
byte-order mark at the start of a file is removed.
"""

import collections
import glob
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lstm_jax.config import DataConfig
from lstm_jax.data import files
from lstm_jax.errors import UserError, name_failure
from lstm_jax.vocabulary import FILE_END

SPLITS = ("train", "validation", "test")
# Largest size in bytes of a file that a command's flag names.
_MAX_ARGUMENT_BYTES = 10**9
# Bytes that are read at a time where only a part of a text is in memory.
_PIECE_BYTES = 2**20
_FILE_END = FILE_END.encode()
_BOM = b"\xef\xbb\xbf"


class Segment(NamedTuple):
    """Bytes `start` to `stop` of a file; of `FILE_END` if the path is ""."""

    path: str
    start: int
    stop: int


def find_files(paths: str) -> list[list[Path]]:
    """Return the files that `data.path` names, in order: of one text, or of each split."""
    texts = paths.split(";")
    if len(texts) not in (1, 3):
        raise UserError(
            f"{paths!r} names {len(texts)} texts: it must name one, or three (train, validation "
            "and test) separated by ;"
        )
    found = [[path for pattern in text.split(",") for path in _find(pattern)] for text in texts]
    first, *others = ([os.path.realpath(path) for path in text] for text in found)
    if both := set(first).intersection(itertools.chain(*others)):
        raise UserError(f"{min(both)} is in the training text and in another split: name it in one")
    if not others and len(set(first)) < len(first):
        twice = collections.Counter(first).most_common(1)[0][0]
        raise UserError(f"{twice} is named twice, so it may be in two splits: name it once")
    return found


def _find(pattern: str) -> list[Path]:
    """Return the files that a path or glob pattern names, at least one."""
    # A name with brackets may be both a file and a pattern: the file takes precedence.
    try:
        pattern = os.path.expanduser(pattern)  # A shell leaves the ~ in --config.data.path=~/a.txt.
        if os.path.isdir(pattern):
            inside = Path(pattern, "*")
            raise UserError(f"{pattern} is a directory: name its files, for example {inside}")
        exists = os.path.exists(pattern)
        matches = [pattern] if exists else sorted({*glob.glob(pattern, recursive=True)})
    except (RecursionError, ValueError):  # It has hundreds of slashes, or a NUL.
        matches = []
    if len(matches) > 1:
        matches = list(itertools.filterfalse(os.path.isdir, matches))
    if not matches:
        raise UserError(f"there is no text file {pattern}: name an existing one")
    return list(map(Path, matches))


def make_absolute(paths: str) -> str:
    """Return the paths and patterns of a `data.path` as absolute ones, if that is possible."""
    here = os.getcwd()
    if set(here) & set(",;"):  # They would separate paths.
        return paths

    def join(path: re.Match[str]) -> str:
        name = os.path.expanduser(path[0])
        return str(Path(here if os.path.exists(name) else glob.escape(here), name))

    return re.sub("[^,;]+", join, paths)


def measure_files(paths: str) -> int:
    """Return the size in bytes of all files in `data.path`; raise `UserError` if one is missing."""
    named = itertools.chain.from_iterable(find_files(paths))
    return sum(os.path.getsize(path) for path in named if os.path.isfile(path))


def list_segments(paths: Iterable[Path], any_bytes: bool, ends: bool) -> list[Segment]:
    """Return the segments of files, each with `FILE_END` after it if it `ends` a document.

    Raise `UserError` if a file is empty or can't be read.
    """
    segments = []
    for path in paths:
        with name_failure(f"can't read {path}"), files.open_regular(path, follow=True) as file:
            has_bom = file.read(len(_BOM)) == _BOM
            size = os.fstat(file.fileno()).st_size
        start = len(_BOM) if has_bom and not any_bytes else 0
        if size <= start:
            raise UserError(f"{path} is empty: name files with text in them")
        segments.append(Segment(str(path), start, size))
        if ends:
            segments.append(Segment("", 0, len(_FILE_END)))
    return segments


def split_files(
    texts: Sequence[Sequence[Path]], data: DataConfig
) -> tuple[list[list[Segment]], str]:
    """Return the segments of train, validation and test, from their files or the files of one text.

    Also return their checksum, as `make_checksum` does. One text is split by `find_cuts`: between
    characters, or between bytes for `data.units=bytes`, like the usual splits of enwik8. Raise
    `UserError` as `list_segments`, or if a file of a text of documents holds `FILE_END`.
    """
    any_bytes, ends = data.units == "bytes", data.document_separator == "file"
    segments = [list_segments(paths, any_bytes, ends) for paths in texts]
    digest, pieces, lengths, last = hashlib.sha256(), [], [], b""
    for piece in cut_pieces(itertools.chain.from_iterable(segments), _PIECE_BYTES):
        content = read_segment(piece)
        if ends and piece.path:
            check_ends(last + content, piece.path)
        last = content[1 - len(_FILE_END) :]  # The mark may lie in two pieces.
        digest.update(content)
        pieces.append(piece)
        lengths.append(int(np.count_nonzero(_find_places(content, any_bytes))))
    if len(segments) > 1:
        return segments, make_checksum(digest, map(count_bytes, segments))
    stops = np.cumsum(lengths)

    def find_byte(place: int) -> int:
        i = int(np.searchsorted(stops, place, side="right"))
        if i == len(pieces) or not pieces[i].path:  # Never within the end of a file.
            return count_bytes(pieces[:i])
        places = np.flatnonzero(_find_places(read_segment(pieces[i]), any_bytes))
        return count_bytes(pieces[:i]) + int(places[place - stops[i]])

    validation, test = map(find_byte, find_cuts(sum(lengths), data.fractions))
    train, rest = cut_segments(segments[0], validation)
    split = [train, *cut_segments(rest, test - validation)]
    return split, make_checksum(digest, map(count_bytes, split))


def make_checksum(digest: "hashlib._Hash", lengths: Iterable[int]) -> str:
    """Return `data.sha256`: SHA-256 over all splits, in hexadecimal, and the bytes of each."""
    return ":".join([digest.hexdigest(), *map(str, lengths)])


def _find_places(content: bytes, any_bytes: bool) -> np.ndarray:
    """Return a mask of the bytes before which a text can be split: all, or starts of characters."""
    # The others are 0b10xxxxxx, which are below -64 as int8.
    return np.frombuffer(content, np.int8) >= (-128 if any_bytes else -64)


def find_cuts(length: int, fractions: Sequence[float]) -> tuple[int, int]:
    """Return where the validation and the test split of a text of this length begin.

    Each split is cut from the rest, with its length rounded down, as in TFDS's Tiny Shakespeare.
    """
    train = int(length * fractions[0])
    return train, train + int((length - train) * (fractions[1] / (fractions[1] + fractions[2])))


def cut_pieces(text: Iterable[Segment], size: int) -> Iterator[Segment]:
    """Cut segments into pieces of at most `size` bytes."""
    for path, start, stop in text:
        for at in range(start, stop, size):
            yield Segment(path, at, min(at + size, stop))


def cut_segments(text: list[Segment], at: int) -> tuple[list[Segment], list[Segment]]:
    """Return the segments before byte `at` of a text, and those after it."""
    for i, (path, start, stop) in enumerate(text):
        if at < stop - start:
            before = [Segment(path, start, start + at)] if at else []
            return [*text[:i], *before], [Segment(path, start + at, stop), *text[i + 1 :]]
        at -= stop - start
    return text, []


def count_bytes(text: Iterable[Segment]) -> int:
    """Return the number of bytes of segments."""
    return sum(segment.stop - segment.start for segment in text)


def read_segment(segment: Segment) -> bytes:
    """Return the bytes of a segment; raise `UserError` if they can't be read."""
    path, start, stop = segment
    if not path:
        return _FILE_END[start:stop]
    with name_failure(f"can't read {path}"), files.open_regular(Path(path), follow=True) as file:
        file.seek(start)
        content = file.read(stop - start)
    if len(content) < stop - start:
        raise UserError(f"{path} has become shorter while it was read")
    return content


def read_segments(segments: Iterable[Segment], any_bytes: bool) -> str:
    """Return the text of segments, of which none ends within a character unless `any_bytes`.

    Raise `UserError` if one can't be read or is not UTF-8.
    """
    if any_bytes:
        return b"".join(map(read_segment, segments)).decode("utf-8", "surrogateescape")
    remedy = ", or train on its bytes with data.units=bytes"
    return "".join(_decode(read_segment(s), s.path, s.start, remedy) for s in segments)


def check_ends(content: bytes, name: str) -> None:
    """Raise `UserError` if the content of a file has `FILE_END`; its name is for the message."""
    if _FILE_END in content:
        raise UserError(f"{name} holds U+FDD0, which marks the end of a file here: remove it")


def read_argument(path: str, flag: str, any_bytes: bool) -> str:
    """Return the text of a file that `flag` of a command names; "-" is standard input."""
    with name_failure(f"can't read {path} ({flag})"):
        if path == "-":
            content = sys.stdin.buffer.read(_MAX_ARGUMENT_BYTES + 1)
        else:
            content = files.read_bytes(Path(path), _MAX_ARGUMENT_BYTES, follow=True)
    if len(content) > _MAX_ARGUMENT_BYTES:
        raise UserError(f"can't read {path} ({flag}): it is larger than a gigabyte")
    return decode_text(content, f"{path} ({flag})", any_bytes)


def decode_text(content: bytes, name: str, any_bytes: bool) -> str:
    """Return the text of a file, from its content; its name is for the error message."""
    if any_bytes:
        return content.decode("utf-8", "surrogateescape")
    return _decode(content, name).removeprefix("\ufeff")


def _decode(content: bytes, name: str, start: int = 0, remedy: str = "") -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {start + error.start}: unpack it if it is compressed, "
            "or convert it with iconv -f ENCODING -t UTF-8, where ENCODING is its own (LATIN1, "
            f"EUC-JP, GB18030 or another){remedy}"
        ) from None


def check_lengths(characters: Mapping[str, int], source: str) -> None:
    """Raise `UserError` if a split of `source` has fewer than two characters."""
    for name, length in characters.items():
        if length < 2:
            raise UserError(f"{source} is too short: its {name} split has {length} characters")


def check_unchanged(sha256: str, expected: str) -> None:
    """Raise `UserError` if the text is not the one that a run began with (`data.sha256`)."""
    if expected and expected != sha256:
        raise UserError(
            "the text is not the one this run was trained on, or is split differently (SHA-256 "
            f"and bytes of each split: {expected} at that time, {sha256} now): restore that text, "
            "or train a new run on this one"
        )
