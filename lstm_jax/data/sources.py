"""Find, split and read the files of a text.

`any_bytes`, an argument of several functions, is whether the tokens are bytes: then bytes that are
not UTF-8 become surrogates, as in Python's "surrogateescape". Otherwise they are an error, and a
byte-order mark at the start of a file is removed.
"""

import codecs
import collections
import glob
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lstm_jax.errors import UserError, name_failure
from lstm_jax.vocabulary import FILE_END

SPLITS = ("train", "validation", "test")
_PIECE_BYTES = 2**20  # That are read at a time.
_FILE_END, _BOM = FILE_END.encode(), "\ufeff".encode()


class Segment(NamedTuple):
    """Bytes `start` to `stop` of a file, or of a text in memory."""

    source: Path | bytes
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
    pattern = os.path.expanduser(pattern)  # A shell leaves the ~ in --config.data.path=~/a.txt.
    if os.path.isdir(pattern):
        inside = Path(pattern, "*")
        raise UserError(f"{pattern} is a directory: name its files, for example {inside}")
    # A name with brackets may be both a file and a pattern: the file takes precedence.
    exists = os.path.exists(pattern)
    matches = [pattern] if exists else sorted({*glob.glob(pattern, recursive=True)})
    if len(matches) > 1:
        matches = list(itertools.filterfalse(os.path.isdir, matches))
    if not matches:
        raise UserError(
            f"there is no text file {pattern}: name an existing one (data.path, --data_path)"
        )
    return list(map(Path, matches))


def make_absolute(paths: str) -> str:
    """Return the paths and patterns of a `data.path` as absolute ones."""
    return re.sub("[^,;]+", lambda path: str(Path(os.path.expanduser(path[0])).absolute()), paths)


def list_segments(paths: Iterable[Path], any_bytes: bool, ends: bool) -> list[Segment]:
    """Return the segments of files, each with `FILE_END` after it if it `ends` a document.

    Raise `UserError` if a file is empty or can't be read.
    """
    segments = []
    for path in paths:
        with name_failure(f"can't read {path}"), path.open("rb") as file:
            start = len(_BOM) if file.read(len(_BOM)) == _BOM and not any_bytes else 0
            stop = file.seek(0, os.SEEK_END)
        if stop <= start:
            raise UserError(f"{path} is empty: name files with text in them")
        segments.append(Segment(path, start, stop))
        if ends:
            segments.append(Segment(_FILE_END, 0, len(_FILE_END)))
    return segments


def split_texts(
    texts: Sequence[list[Segment]], any_bytes: bool, fractions: Sequence[float]
) -> tuple[dict[str, list[Segment]], str]:
    """Return train, validation and test, which are given, or cut from one text by `find_cuts`.

    One text is cut between characters; if `any_bytes`, between bytes, like the usual splits of
    enwik8, but never within `FILE_END`. Also return the checksum, `data.sha256`: SHA-256 over all
    splits, in hexadecimal, and the number of bytes of each.
    """
    digest, lengths = hashlib.sha256(), []
    for segment in itertools.chain.from_iterable(texts):
        lengths.append(0)
        for piece in read_bytes([segment]):
            digest.update(piece)
            lengths[-1] += int(np.count_nonzero(_may_cut(piece, any_bytes)))
    splits = list(texts)
    if len(texts) == 1:
        ends = np.cumsum(lengths)

        def find_byte(place: int) -> int:
            i = int(np.searchsorted(ends, place, side="right"))
            before = count_bytes(texts[0][:i])
            if i == len(ends) or texts[0][i].source == _FILE_END:
                return before
            return before + _find_byte(texts[0][i], place - int(ends[i]) + lengths[i], any_bytes)

        validation, test = map(find_byte, find_cuts(sum(lengths), fractions))
        train, rest = cut_segments(texts[0], validation)
        splits = [train, *cut_segments(rest, test - validation)]
    sizes = map(str, map(count_bytes, splits))
    return dict(zip(SPLITS, splits, strict=True)), ":".join([digest.hexdigest(), *sizes])


def _find_byte(segment: Segment, place: int, any_bytes: bool) -> int:
    """Return how many bytes of a segment are before one of its characters."""
    before = 0
    for piece in read_bytes([segment]):
        places = np.flatnonzero(_may_cut(piece, any_bytes))
        if place < len(places):
            return before + int(places[place])
        place -= len(places)
        before += len(piece)
    return before


def _may_cut(content: bytes, any_bytes: bool) -> np.ndarray:
    """Return a mask of the bytes before which a text can be cut: all, or starts of characters."""
    # The others are 0b10xxxxxx, which are below -64 as int8.
    return np.frombuffer(content, np.int8) >= (-128 if any_bytes else -64)


def find_cuts(length: int, fractions: Sequence[float]) -> tuple[int, int]:
    """Return where the validation and the test split of a text of this length begin.

    Each split is cut from the rest, with its length rounded down, as in TFDS's Tiny Shakespeare.
    """
    train = int(length * fractions[0])
    return train, train + int((length - train) * (fractions[1] / (fractions[1] + fractions[2])))


def cut_segments(text: list[Segment], at: int) -> tuple[list[Segment], list[Segment]]:
    """Return the segments before byte `at` of a text, and those after it."""
    for i, (source, start, stop) in enumerate(text):
        if at < stop - start:
            before = [Segment(source, start, start + at)] if at else []
            return [*text[:i], *before], [Segment(source, start + at, stop), *text[i + 1 :]]
        at -= stop - start
    return text, []


def count_bytes(text: Iterable[Segment]) -> int:
    """Return the number of bytes of segments."""
    return sum(segment.stop - segment.start for segment in text)


def read_bytes(text: Iterable[Segment]) -> Iterator[bytes]:
    """Yield the bytes of segments in pieces; raise `UserError` if they can't be read."""
    for source, start, stop in text:
        if isinstance(source, bytes):
            yield source[start:stop]
            continue
        with name_failure(f"can't read {source}"), source.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(_PIECE_BYTES, stop - start))
                if not piece:
                    raise UserError(f"{source} has become shorter while it was read")
                start += len(piece)
                yield piece


def read_text(text: Iterable[Segment], any_bytes: bool) -> Iterator[str]:
    """Yield the text of segments in pieces; raise `UserError` if one is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if any_bytes else "strict")
    for segment in text:
        at = segment.start
        for piece in read_bytes([segment]):
            at += len(piece)
            try:
                # No segment ends within a character, unless any byte is allowed.
                yield decoder.decode(piece, final=not any_bytes and at == segment.stop)
            except UnicodeDecodeError as error:
                name = "the text" if isinstance(segment.source, bytes) else segment.source
                raise _describe(error, name, at - len(error.object)) from None
    yield decoder.decode(b"", final=True)


def read_argument(path: str, flag: str, any_bytes: bool) -> str:
    """Return the text of a file that `flag` of a command names; "-" is standard input."""
    with name_failure(f"can't read {path} ({flag})"):
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    if any_bytes:
        return content.decode("utf-8", "surrogateescape")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _describe(error, f"{path} ({flag})") from None


def _describe(error: UnicodeDecodeError, name: object, before: int = 0) -> UserError:
    return UserError(
        f"{name} is not UTF-8 at byte {before + error.start}: unpack it if it is compressed, "
        "convert it with iconv -f ENCODING -t UTF-8, where ENCODING is its own (LATIN1, EUC-JP, "
        "GB18030 or another), or train on its bytes with data.units=bytes"
    )
