"""Find and split the files of a text, and encode each split as one array of ids.

A text is read in blocks, as often as needed, so that it may be larger than memory. The ids of a
large one are written to a file in the user's cache, and mapped from it. The name of the file is a
checksum of text and vocabulary, so that it never has the ids of another text.
"""

import codecs
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
_MOST_CHARACTERS = 1000  # Different ones, of which each has an embedding.
_BLOCK_BYTES = 2**20  # That are read at a time.
_MOST_EVALUATED = 500_000  # Bytes of the validation split and of the test split of a long text.
_BLOCK = 2**24  # Ids that are counted at a time.
_COMMA, _SEMICOLON = r",(?!\])", r";(?!\])"  # In brackets, as in [,], they are part of a name.
_FILE_END = FILE_END.encode()

# Where a block can end, so that its tokens are those of the whole text; the last such place first
# ("r"). Characters: but not within line breaks, which may be a stop token. Others: after a line
# break, or before a space between two letters, so that each block has a token.
_CHARACTERS = regex.compile(r"(?r)(?<=[^\r\n])(?=[^\r\n])")
_WORDS = regex.compile(r"(?r)(?<=\n)(?=\P{White_Space})|(?<=[A-Za-z])(?= [A-Za-z])")


class Source(NamedTuple):
    """Bytes `start` to `stop` of a file, or of a text in memory."""

    name: object  # For messages.
    open: Callable[[], Any]
    start: int
    stop: int


class Text(NamedTuple):
    """Bytes `begin` to `end` of sources one after another, and how they are divided into tokens."""

    sources: list[Source]
    begin: int
    end: int
    units: str  # The kind of tokens.
    name: str = ""
    checksum: str = ""  # With the name, determines the bytes; "" for a text in memory.

    def read_blocks(self) -> Iterator[str]:
        """Yield the text in blocks whose tokens are those of the whole text.

        Raise `UserError` if it can't be read or is not UTF-8.
        """
        errors, rest = "surrogateescape" if self.units == "bytes" else "strict", ""
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        pattern = _CHARACTERS if self.units in ("characters", "bytes") else _WORDS
        for source, place, content in _read_bytes(self.sources, self.begin, self.end):
            try:
                # No source ends within a character, unless any byte is allowed.
                piece = decoder.decode(content, errors == "strict" and place == source.stop)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{source.name} is not UTF-8 at byte {place - len(error.object) + error.start}:"
                    " unpack it if it is compressed, convert it with iconv -f ENCODING -t UTF-8, "
                    "where ENCODING is its own (LATIN1, EUC-JP, GB18030 or another), or train on "
                    "its bytes with --config.data.units=bytes"
                ) from None
            rest += piece
            if cut := pattern.search(rest, max(len(rest) - len(piece) - 2, 0)):
                yield rest[: cut.start()]
                rest = rest[cut.start() :]
        if rest := rest + decoder.decode(b"", True):
            yield rest

    def read(self) -> str:
        """Return the whole text."""
        return "".join(self.read_blocks())

    def make_vocabulary(self, data: DataConfig) -> Vocabulary:
        """Return the vocabulary of the text for the `data` fields of a config."""
        stop = SEPARATORS[data.document_separator]
        options = self.units, data.min_count, stop, data.vocabulary_size
        return Vocabulary.from_text(self.read_blocks(), *options)

    def encode(self, vocabulary: Vocabulary) -> Ids:
        """Return the ids of the text, in the smallest dtype that holds the vocabulary.

        Those of a large text are in a file. Raise `UnavailableError` if it can't be written.
        """
        dtype = np.min_scalar_type(len(vocabulary) - 1)
        blocks = (vocabulary.encode(block).astype(dtype) for block in self.read_blocks())
        if not self.checksum or self.end - self.begin <= LARGE:
            return np.concatenate([np.zeros(0, dtype), *blocks])
        content = json.dumps([__version__, self.name, self.checksum, vocabulary.to_fields()])
        name = f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:32]}.ids"
        try:
            path = user_cache.make_directory("texts") / name
            if not path.exists():
                note(f"Writing the ids of the {self.name} text, once, to {path}")
                files.write_file(path, (block.data for block in blocks))
        except OSError as error:
            raise UnavailableError(
                f"can't write the ids of the text to {error.filename} ({error.strerror}): free "
                "space, or set XDG_CACHE_HOME to another directory"
            ) from None
        return np.memmap(path, dtype, mode="r")

    def measure(self, vocabulary: Vocabulary, ids: Ids) -> TextSize:
        """Return the size of the text, of which these are the ids, without its first token.

        Nothing predicts that.
        """
        start, counts, stop = next(self.read_blocks()), Counter[str](), vocabulary.stop
        first = vocabulary.tokens[ids[0]]
        if ids[0] == UNKNOWN_ID:
            first = next(split_text(start, self.units, stop))
        if UNKNOWN_ID in ids:
            counts = count_tokens(self.read_blocks(), self.units, stop) - Counter([first])
        if self.units == "tokens":  # The text may begin without the space of a token.
            first = start[: start.index(first.strip(" ")) + len(first.strip(" "))]
        # A token of bytes may end within a character, which then counts as a later one.
        whole = first.encode("utf-8", "surrogateescape").decode("utf-8", "ignore")
        characters = sum(map(len, self.read_blocks())) - len(whole)
        # With one byte for the end of each.
        sizes = (n * (len(x.encode()) + 1) for x, n in counts.items() if x not in vocabulary)
        return TextSize(len(ids) - 1, characters, sum(sizes))


def load_texts(data: DataConfig) -> dict[str, Text]:
    """Return the splits that the `data` fields of a config describe, which are read when used.

    A text is cut into splits, with the bytes of each rounded down, and then up to a whole
    character. The checksum, `data.sha256`, is SHA-256 over all splits, in hexadecimal, and the
    number of bytes of each. Raise `UserError` if a text is missing, or not the one that a run began
    with.
    """
    if data.path:
        texts = [_list_sources(paths, data) for paths in find_files(data.path)]
    elif splits := standard_texts.read_splits(data):
        texts = [[_hold(text)] for text in splits]
    else:
        from lstm_jax.data import datasets  # Only for a dataset: importing TFDS takes seconds.

        texts = [[_hold(text)] for text in datasets.read_dataset(data)]
    sources = [*itertools.chain(*texts)]
    ends = [*itertools.accumulate(sum(x.stop - x.start for x in text) for text in texts)]
    if len(texts) == 1:
        (size,), (of_train, of_validation, of_test) = ends, data.fractions
        train = int(size * of_train)
        rest = int((size - train) * (of_validation / (of_validation + of_test)))
        ends = [_round_up(sources, at, data.units == "bytes") for at in (train, train + rest)]
        ends.append(size)
    digest = hashlib.sha256()
    for _, _, content in _read_bytes(sources, 0, ends[-1]):
        digest.update(content)
    bounds = [*itertools.pairwise([0, *ends])]
    checksum = ":".join([digest.hexdigest(), *(str(end - begin) for begin, end in bounds)])
    if data.sha256 not in ("", checksum):
        raise UserError(
            "the text is not the one this run was trained on, or is split differently (SHA-256 "
            f"and bytes of each split: {data.sha256} at that time, {checksum} now): restore that "
            "text, or train a new run on this one"
        )
    return {
        name: Text(sources, *of_split, data.units, name, checksum)
        for name, of_split in zip(SPLITS, bounds, strict=True)
    }


def resolve_text(data: DataConfig, splits: Mapping[str, Text]) -> DataConfig:
    """Return the fields with the checksum of this text and absolute paths."""
    directory = data.directory and os.path.abspath(os.path.expanduser(data.directory))
    path, checksum = make_absolute(data.path), splits["train"].checksum
    return dataclasses.replace(data, sha256=checksum, path=path, directory=directory)


def encode_splits(
    splits: Mapping[str, Text], vocabulary: Vocabulary
) -> tuple[dict[str, Ids], dict[str, TextSize]]:
    """Return the ids of each split; and the sizes of validation and test text.

    These are without the first token, which is never predicted. Raise `UserError` if a split is
    too short.
    """
    ids = {name: text.encode(vocabulary) for name, text in splits.items()}
    for name, of_split in ids.items():
        if len(of_split) < 2:
            length = f"{len(of_split)} {vocabulary.token_name}s, and needs 2"
            raise UserError(f"the {name} split is too short: it has {length}")
    return ids, {name: splits[name].measure(vocabulary, ids[name]) for name in SPLITS[1:]}


def load_texts_of_run(data: DataConfig, path: str | None = None) -> dict[str, Text]:
    """Return the splits that a run was trained on, for commands that read its text again.

    `data` are fields of the run's config; `path` is where the text is now, or None. Raise
    `UserError` as `load_texts` does.
    """
    if not data.sha256 and path is None:
        raise UserError(
            "the model was not trained here, so it has no text of its own: name one with --text or "
            "--data_path"
        )
    return load_texts(data if path is None else dataclasses.replace(data, path=path))


def read_splits(data: DataConfig) -> dict[str, str]:
    """Read the text of each split into memory, for the `data` fields of a config."""
    return {name: text.read() for name, text in load_texts(data).items()}


def hold_text(content: bytes, units: str, name: str = "the text") -> Text:
    """Return a text in memory, with the kind of its tokens, and its name in messages."""
    return Text([_hold(content, name)], 0, len(content), units)


def read_argument(path: str, flag: str, units: str, stop: str = "") -> Text:
    """Return the text of a file that `flag` of a command names; "-" is standard input.

    `FILE_END` is added if it is the stop token. Raise `UserError` if the file can't be read.
    """
    with name_failure(f"can't read {path} ({flag})"):
        content = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    end = _FILE_END if stop == FILE_END else b""
    if units != "bytes":
        content = content.removeprefix(codecs.BOM_UTF8)
    return hold_text(content + end, units, f"{path} ({flag})")


def choose_tokens_and_splits(data: DataConfig) -> dict[str, Any]:
    """Return the kind of tokens and the fractions of the splits that suit a text.

    Tokens are characters, or bytes if a text is not UTF-8 or has too many different characters. A
    long text has short validation and test splits.
    """
    if not data.path:
        return {"data.units": "characters", "data.fractions": data.fractions}
    sources = _list_sources(itertools.chain(*find_files(data.path)), data)
    size, characters = sum(x.stop - x.start for x in sources), set[str]()
    try:
        for block in Text(sources, 0, size, "characters").read_blocks():
            characters.update(block)
    except UserError:  # It is not UTF-8.
        characters.clear()
    is_text = 0 < len(characters) <= _MOST_CHARACTERS
    share = float(f"{min(0.05, _MOST_EVALUATED / max(size, 1)):.2g}")
    fractions = (1 - 2 * share, share, share)
    return {"data.units": "characters" if is_text else "bytes", "data.fractions": fractions}


def count_ids(ids: Ids, vocabulary_size: int) -> np.ndarray:
    """Return the number of occurrences of each id: int64 [vocabulary]."""
    # `bincount` makes a copy of 8 bytes for each id.
    blocks = (ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK))
    counts = (np.bincount(block, minlength=vocabulary_size) for block in blocks)
    return sum(counts, np.zeros(vocabulary_size, np.int64))


def find_files(paths: str) -> list[list[Path]]:
    """Return the files that `data.path` names, in order: of one text, or of each split."""
    texts = [re.split(_COMMA, text) for text in re.split(_SEMICOLON, paths)]
    if len(texts) not in (1, 3):
        raise UserError(
            f"{paths!r} names {len(texts)} texts: it must name one, or three (train, validation "
            "and test) separated by ;"
        )
    return [[path for pattern in text for path in _find(pattern)] for text in texts]


def _find(pattern: str) -> list[Path]:
    """Return the files that a path or glob pattern names, at least one."""
    pattern = os.path.expanduser(pattern)  # A shell leaves the ~ in --config.data.path=~/a.txt.
    if os.path.isdir(pattern):
        inside = Path(pattern, "*")
        raise UserError(f"{pattern} is a directory: name its files, for example {inside}")
    # A name with brackets may be both a file and a pattern.
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    if paths := sorted({x for x in matches if not os.path.isdir(x)}):
        return [*map(Path, paths)]
    raise UserError(
        f"there is no text file {pattern!r}: name an existing one (--config.data.path, --data_path)"
    )


def make_absolute(paths: str) -> str:
    """Return the paths and patterns of a `data.path` as absolute ones."""
    here = re.sub("[,;]", r"[\g<0>]", glob.escape(str(Path.cwd())))
    one = f"(?:(?!{_COMMA}|{_SEMICOLON}).)+"
    return re.sub(one, lambda path: str(Path(here, os.path.expanduser(path[0]))), paths)


def _hold(content: bytes, name: str = "the text") -> Source:
    return Source(name, functools.partial(io.BytesIO, content), 0, len(content))


def _list_sources(paths: Iterable[Path], data: DataConfig) -> list[Source]:
    """Return files as sources, with `FILE_END` after each if it ends a document.

    A byte-order mark is left out, unless the tokens are bytes.
    """
    sources = []
    for path in paths:
        with name_failure(f"can't read {path}"), files.check_file(path).open("rb") as file:
            has_mark = file.read(3) == codecs.BOM_UTF8 and data.units != "bytes"
            size = file.seek(0, os.SEEK_END)
        start, opener = 3 if has_mark else 0, functools.partial(path.open, "rb")
        sources.append(Source(path, opener, start, size))
        if data.document_separator == "file":
            sources.append(_hold(_FILE_END))
    return sources


def _round_up(sources: list[Source], place: int, any_bytes: bool) -> int:
    """Round a place, in bytes, up to the first at which a split may begin.

    That is the first byte of a character; if `any_bytes`, any byte that is not within `FILE_END`.
    """
    around = b"".join(content for _, _, content in _read_bytes(sources, place - 2, place + 4))
    start = min(place, 2)
    if any_bytes and _FILE_END not in around[: start + 2]:
        return place
    starts = (i for i, byte in enumerate(around[start:]) if byte & 0xC0 != 0x80)
    return place + next(starts, len(around) - start)


def _read_bytes(
    sources: Iterable[Source], begin: int, end: int
) -> Iterator[tuple[Source, int, bytes]]:
    """Yield bytes `begin` to `end` in pieces, each with its source and where it ends there.

    Raise `UserError` if they can't be read.
    """
    for source in sources:
        place, stop = source.start + max(begin, 0), min(source.start + end, source.stop)
        begin, end = begin - (source.stop - source.start), end - (source.stop - source.start)
        if place < stop:
            with name_failure(f"can't read {source.name}"), source.open() as file:
                file.seek(place)
                while content := file.read(min(_BLOCK_BYTES, stop - place)):
                    place += len(content)
                    yield source, place, content
