"""Find and split the files of a text, and encode each split as one array of ids.

A text is read in pieces, as often as needed, so that it may be larger than memory. The ids of a
large one are written to a file in the user's cache, and mapped from it. The name of the file is a
checksum of text and vocabulary, so that it never has the ids of another text.
"""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from lstm_jax import user_cache
from lstm_jax.config import DataConfig
from lstm_jax.data import files, standard_texts
from lstm_jax.data.standard_texts import SPLITS
from lstm_jax.errors import UnavailableError, UserError, name_failure, note
from lstm_jax.version import __version__
from lstm_jax.vocabulary import (
    FILE_END,
    SEPARATORS,
    UNKNOWN_ID,
    Ids,
    TextSize,
    Vocabulary,
    count_tokens,
    split_text,
)

LARGE = 16 * 10**6  # The ids of a text of more bytes are in a file.
_PIECE_BYTES = 2**20  # That are read at a time.
_BLOCK = 2**24  # Ids that are counted at a time.
_COMMA, _SEMICOLON = r",(?!\])", r";(?!\])"  # In brackets, as in [,], they are part of a name.
_FILE_END, _BOM = FILE_END.encode(), codecs.BOM_UTF8

# Where a text can be cut, so that the tokens of its pieces are those of the whole text; the last
# such place first ("r"). Characters: but not within line breaks, which may be a stop token. Others:
# after a line break, or before a space between two letters.
_CHARACTERS = regex.compile(r"(?r)(?<=[^\r\n])(?=[^\r\n])")
_WORDS = regex.compile(r"(?r)(?<=[\r\n])(?=\P{White_Space})|(?<=[A-Za-z])(?= [A-Za-z])")
_CUTS = {"characters": _CHARACTERS, "bytes": _CHARACTERS}


class Segment(NamedTuple):
    """Bytes `start` to `stop` of a file, or of a text in memory."""

    source: Path | bytes
    start: int
    stop: int


class Text(NamedTuple):
    """A text, in files or in memory, and how it is divided into tokens."""

    segments: list[Segment]
    units: str  # The kind of tokens.
    stop: str  # The stop token, or "".
    name: str = ""
    checksum: str = ""  # With the name, determines the segments; "" for a text in memory.

    def read_pieces(self) -> Iterator[str]:
        """Yield the text in pieces whose tokens are those of the whole text."""
        pattern, rest = _CUTS.get(self.units, _WORDS), ""
        for piece in _decode(self.segments, self.units == "bytes"):
            rest += piece
            if match := pattern.search(rest, max(len(rest) - len(piece) - 2, 0)):
                yield rest[: match.start()]
                rest = rest[match.start() :]
        if rest:
            yield rest

    def read(self) -> str:
        """Return the whole text."""
        return "".join(self.read_pieces())

    def make_vocabulary(self, data: DataConfig) -> Vocabulary:
        """Return the vocabulary of the text for the `data` fields of a config."""
        options = self.units, data.min_count, self.stop, data.vocabulary_size
        return Vocabulary.from_text(self.read_pieces(), *options)

    def encode(self, vocabulary: Vocabulary) -> Ids:
        """Return the ids of the text, in the smallest dtype that holds the vocabulary.

        Those of a large text are in a file. Raise `UserError` if the text can't be read or is not
        UTF-8, and `UnavailableError` if the file can't be written.
        """
        dtype = np.min_scalar_type(len(vocabulary) - 1)
        pieces = (vocabulary.encode(piece).astype(dtype) for piece in self.read_pieces())
        if not self.checksum or _count_bytes(self.segments) <= LARGE:
            return np.concatenate([np.zeros(0, dtype), *pieces])
        content = json.dumps([__version__, self.name, self.checksum, vocabulary.to_fields()])
        name = f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:32]}.ids"
        path = user_cache.get_path("texts") / name
        try:
            if not path.exists():
                note(f"Writing the ids of the {self.name} text, once, to {path}")
                path.parent.mkdir(parents=True, exist_ok=True)
                for old in path.parent.glob("*.partial"):  # Some are those of killed processes.
                    with contextlib.suppress(FileNotFoundError):
                        if time.time() - old.stat().st_mtime > 24 * 3600:
                            old.unlink()
                files.write_file(path, (piece.data for piece in pieces))
        except OSError as error:
            raise UnavailableError(
                f"can't write the ids of the text to {path.parent} ({error.strerror}): free space, "
                "or set XDG_CACHE_HOME to another directory"
            ) from None
        return np.memmap(path, dtype, mode="r")

    def measure(self, vocabulary: Vocabulary, ids: Ids, first: bool = False) -> TextSize:
        """Return the size of the text, of which these are the ids, with or without its first token.

        Without, because it is never predicted.
        """
        characters, unknown = sum(map(len, self.read_pieces())), Counter[str]()
        if count_ids(ids, len(vocabulary))[UNKNOWN_ID]:
            counts = count_tokens(self.read_pieces(), self.units, self.stop)
            unknown = Counter({token: n for token, n in counts.items() if token not in vocabulary})
        if not first:
            starts = itertools.accumulate(self.read_pieces())  # The first may be white space alone.
            start = next(x for x in starts if any(split_text(x, self.units, self.stop)))
            token = vocabulary.tokens[ids[0]]
            if ids[0] == UNKNOWN_ID:
                token = next(split_text(start, self.units, self.stop))
                unknown[token] -= 1
            if self.units == "tokens":  # The text may begin without the space of a token.
                word = token.lstrip(" ")
                token = start[: start.index(word) + len(word)]
            # A token of bytes may end within a character, which then counts as a later one.
            characters -= len(token.encode("utf-8", "surrogateescape").decode("utf-8", "ignore"))
        # With one byte for the end of each.
        spelled = sum(n * (len(token.encode()) + 1) for token, n in unknown.items())
        return TextSize(len(ids) - (not first), characters, spelled)


@dataclasses.dataclass
class Splits:
    """The text of each split."""

    texts: dict[str, Text]  # By the name of the split.
    sha256: str  # See `_split`.

    def resolve(self, data: DataConfig) -> DataConfig:
        """Return the fields with the checksum of this text and absolute paths."""
        directory = data.directory and os.path.abspath(os.path.expanduser(data.directory))
        path = make_absolute(data.path)
        return dataclasses.replace(data, sha256=self.sha256, path=path, directory=directory)

    def encode(self, vocabulary: Vocabulary) -> tuple[dict[str, Ids], dict[str, TextSize]]:
        """Return the ids of each split; and the sizes of validation and test text.

        These are without the first token, which is never predicted. Raise `UserError` if a split is
        too short.
        """
        ids = {name: text.encode(vocabulary) for name, text in self.texts.items()}
        for name, of_split in ids.items():
            if len(of_split) < 2:
                length = f"{len(of_split)} {vocabulary.token_name}s, and needs 2"
                raise UserError(f"the {name} split is too short: it has {length}")
        measured = [(name, text) for name, text in self.texts.items() if name != "train"]
        return ids, {name: text.measure(vocabulary, ids[name]) for name, text in measured}


def load_texts(data: DataConfig) -> Splits:
    """Return the splits that the `data` fields of a config describe, which are read when used.

    Raise `UserError` if a text is missing, or not the one that a run began with.
    """
    if data.path:
        texts = [_list_segments(paths, data) for paths in find_files(data.path)]
    elif paths := standard_texts.find_splits(data):
        texts = [_list_segments([path], data) for path in paths]
    else:
        from lstm_jax.data import datasets  # Only for a dataset: importing TFDS takes seconds.

        texts = [[_hold(content)] for content in datasets.read_dataset(data)]
    splits, sha256 = _split(texts, data)
    if data.sha256 not in ("", sha256):
        raise UserError(
            "the text is not the one this run was trained on, or is split differently (SHA-256 "
            f"and bytes of each split: {data.sha256} at that time, {sha256} now): restore that "
            "text, or train a new run on this one"
        )
    train = Text(splits[0], data.units, "").read_pieces
    stop = find_stop_text(data.document_separator, train)
    named = zip(SPLITS, splits, strict=True)
    found = {name: Text(split, data.units, stop, name, sha256) for name, split in named}
    return Splits(found, sha256)


def load_texts_of_run(
    data: DataConfig, path: str | None = None, directory: str | None = None
) -> dict[str, Text]:
    """Return the splits that a run was trained on, for commands that read its text again.

    `data` are fields of the run's config; `path` and `directory` are where the text is now, or
    None. Raise `UserError` as `load_texts` does.
    """
    if not data.sha256 and path is None:
        raise UserError(
            "the model was not trained here, so it has no text of its own: name one with --text or "
            "--data_path"
        )
    path = data.path if path is None else path
    directory = data.directory if directory is None else directory
    return load_texts(dataclasses.replace(data, path=path, directory=directory)).texts


def read_splits(data: DataConfig) -> dict[str, str]:
    """Read the text of each split into memory, for the `data` fields of a config."""
    return {name: text.read() for name, text in load_texts(data).texts.items()}


def hold_text(text: str, kind: str, stop: str) -> Text:
    """Return a text in memory, with tokens of one of `vocabulary.KINDS` and a stop token or ""."""
    return Text([_hold(text.encode("utf-8", "surrogateescape"))], kind, stop)


def read_argument(path: str, flag: str, any_bytes: bool) -> str:
    """Return the text of a file that `flag` of a command names; "-" is standard input.

    If the tokens are bytes (`any_bytes`), those that are not UTF-8 become surrogates, as in
    Python's "surrogateescape". Raise `UserError` for them otherwise.
    """
    with name_failure(f"can't read {path} ({flag})"):
        content = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    try:
        decoded = content.decode("utf-8", "surrogateescape" if any_bytes else "strict")
        return decoded if any_bytes else decoded.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _describe(error, f"{path} ({flag})") from None


def find_stop_text(separator: str, read_pieces: Callable[[], Iterable[str]]) -> str:
    """Return the stop token of a text, for a name in `SEPARATORS`.

    It is that of Windows if the text has no other. `read_pieces` returns the text in pieces.
    """
    stop = SEPARATORS[separator]
    windows = stop.replace("\n", "\r\n")
    other = re.compile(f"(?<!\r){re.escape(stop)}")
    has_windows = windows != stop and any(windows in piece for piece in read_pieces())
    return stop if not has_windows or any(map(other.search, read_pieces())) else windows


def count_ids(ids: Ids, vocabulary_size: int) -> np.ndarray:
    """Return the number of occurrences of each id: int64 [vocabulary]."""
    counts = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(ids), _BLOCK):  # `bincount` makes a copy of 8 bytes for each id.
        counts += np.bincount(ids[start : start + _BLOCK], minlength=vocabulary_size)
    return counts


def find_files(paths: str) -> list[list[Path]]:
    """Return the files that `data.path` names, in order: of one text, or of each split."""
    texts = re.split(_SEMICOLON, paths)
    if len(texts) not in (1, 3):
        raise UserError(
            f"{paths!r} names {len(texts)} texts: it must name one, or three (train, validation "
            "and test) separated by ;"
        )
    return [
        [path for pattern in re.split(_COMMA, text) for path in _find(pattern)] for text in texts
    ]


def _find(pattern: str) -> list[Path]:
    """Return the files that a path or glob pattern names, at least one."""
    pattern = os.path.expanduser(pattern)  # A shell leaves the ~ in --config.data.path=~/a.txt.
    if os.path.isfile(pattern):  # A name with brackets may be both a file and a pattern.
        return [Path(pattern)]
    if os.path.isdir(pattern):
        inside = Path(pattern, "*")
        raise UserError(f"{pattern} is a directory: name its files, for example {inside}")
    matches = {x for x in glob.glob(pattern, recursive=True) if not os.path.isdir(x)}
    if not matches:
        raise UserError(
            f"there is no text file {pattern!r}: name an existing one "
            "(--config.data.path, --data_path)"
        )
    return [*map(Path, sorted(matches))]


def make_absolute(paths: str) -> str:
    """Return the paths and patterns of a `data.path` as absolute ones."""
    here = re.sub("[,;]", r"[\g<0>]", glob.escape(str(Path.cwd())))
    one = f"(?:(?!{_COMMA}|{_SEMICOLON}).)+"
    return re.sub(one, lambda path: str(Path(here, os.path.expanduser(path[0]))), paths)


def _hold(content: bytes) -> Segment:
    return Segment(content, 0, len(content))


def _list_segments(paths: Iterable[Path], data: DataConfig) -> list[Segment]:
    """Return the segments of files, each with `FILE_END` after it if it ends a document.

    A byte-order mark is left out, unless the tokens are bytes.
    """
    segments = []
    for path in paths:
        with name_failure(f"can't read {path}"), files.check_file(path).open("rb") as file:
            start = len(_BOM) if file.read(len(_BOM)) == _BOM and data.units != "bytes" else 0
            segments.append(Segment(path, start, file.seek(0, os.SEEK_END)))
        if data.document_separator == "file":
            segments.append(_hold(_FILE_END))
    return segments


def _split(texts: list[list[Segment]], data: DataConfig) -> tuple[list[list[Segment]], str]:
    """Return train, validation and test, which are given, or cut from one text.

    Each split is cut from the rest, with its bytes rounded down, and then up to a whole character.
    Also return the checksum, `data.sha256`: SHA-256 over all splits, in hexadecimal, and the number
    of bytes of each.
    """
    if len(texts) == 1:
        (text,), (of_train, of_validation, of_test) = texts, data.fractions
        size = _count_bytes(text)
        train = int(size * of_train)
        rest = int((size - train) * (of_validation / (of_validation + of_test)))
        places = (_round_up(text, at, data.units == "bytes") for at in (train, train + rest))
        texts = [_cut(text, *pair) for pair in itertools.pairwise([0, *places, size])]
    digest = hashlib.sha256()
    for piece in _read_bytes(itertools.chain.from_iterable(texts)):
        digest.update(piece)
    return texts, ":".join([digest.hexdigest(), *(str(_count_bytes(text)) for text in texts)])


def _round_up(text: list[Segment], place: int, any_bytes: bool) -> int:
    """Round a place, in bytes, up to the first at which a split may begin.

    That is the first byte of a character; if `any_bytes`, any byte that is not within `FILE_END`.
    """
    following = _cut(text, place, place + 4)
    if any_bytes and not (following and following[0].source == _FILE_END):
        return place
    content = b"".join(_read_bytes(following))
    starts = (i for i, byte in enumerate(content) if byte & 0xC0 != 0x80)
    return place + next(starts, len(content))


def _cut(text: list[Segment], begin: int, end: int) -> list[Segment]:
    """Return bytes `begin` to `end` of a text."""
    cut, at = [], 0
    for source, start, stop in text:
        first, last = max(start, start + begin - at), min(stop, start + end - at)
        if first < last:
            cut.append(Segment(source, first, last))
        at += stop - start
    return cut


def _count_bytes(text: Iterable[Segment]) -> int:
    return sum(segment.stop - segment.start for segment in text)


def _read_bytes(text: Iterable[Segment]) -> Iterator[bytes]:
    """Yield the bytes of segments in pieces; raise `UserError` if they can't be read."""
    for source, start, stop in text:
        if isinstance(source, bytes):
            yield source[start:stop]
            continue
        with name_failure(f"can't read {source}"), source.open("rb") as file:
            file.seek(start)
            while piece := file.read(min(_PIECE_BYTES, stop - file.tell())):
                yield piece


def _decode(text: Iterable[Segment], any_bytes: bool) -> Iterator[str]:
    """Yield the text of segments in pieces; raise `UserError` if one is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if any_bytes else "strict")
    for segment in text:
        at = segment.start
        for piece in _read_bytes([segment]):
            at += len(piece)
            try:
                # No segment ends within a character, unless any byte is allowed.
                yield decoder.decode(piece, final=not any_bytes and at == segment.stop)
            except UnicodeDecodeError as error:
                name = "the text" if isinstance(segment.source, bytes) else segment.source
                raise _describe(error, name, at - len(error.object)) from None
    yield decoder.decode(b"", final=True)


def _describe(error: UnicodeDecodeError, name: object, before: int = 0) -> UserError:
    return UserError(
        f"{name} is not UTF-8 at byte {before + error.start}: unpack it if it is compressed, "
        "convert it with iconv -f ENCODING -t UTF-8, where ENCODING is its own (LATIN1, EUC-JP, "
        "GB18030 or another), or train on its bytes with --config.data.units=bytes"
    )
