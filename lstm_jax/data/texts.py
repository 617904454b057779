"""Read the splits of a text, and encode each as one array of ids.

The ids of a large text are written to a file in the user's cache, and mapped from it. The name of
the file is a checksum of text and vocabulary, so that it never has the ids of another text.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
from tqdm import tqdm

from lstm_jax import user_cache
from lstm_jax.config import DataConfig
from lstm_jax.data import files, sources, standard_texts
from lstm_jax.data.sources import Segment
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.version import __version__
from lstm_jax.vocabulary import (
    SEPARATORS,
    UNKNOWN_ID,
    Ids,
    TextSize,
    Vocabulary,
    count_tokens,
    split_text,
)

LARGE = 16 * 10**6  # The ids of a text of more bytes are in a file.
_BLOCK = 2**24  # Ids that are counted at a time.

# Where a text can be cut, so that the tokens of its pieces are those of the whole text; the last
# such place first ("r"). Characters: but not within line breaks, which may be a stop token. Others:
# after a line break, or before a space between two letters.
_CHARACTERS = regex.compile(r"(?r)(?<=[^\r\n])(?=[^\r\n])")
_WORDS = regex.compile(r"(?r)(?<=[\r\n])(?=\P{White_Space})|(?<=[A-Za-z])(?= [A-Za-z])")
_CUTS = {"characters": _CHARACTERS, "bytes": _CHARACTERS}


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
        size = sources.count_bytes(self.segments)
        shown = {"desc": self.name, "unit": "B", "unit_scale": True, "leave": False}
        with tqdm(total=size, disable=None if size > LARGE else True, **shown) as bar:
            for piece in sources.read_text(self.segments, self.units == "bytes"):
                bar.update(len(piece))
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
        counts = count_tokens(self.read_pieces(), self.units, self.stop)
        size = data.vocabulary_size
        return Vocabulary.from_counts(counts, self.units, data.min_count, self.stop, size)

    def encode(self, vocabulary: Vocabulary) -> Ids:
        """Return the ids of the text, in the smallest dtype that holds the vocabulary.

        Those of a large text are in a file. Raise `UserError` if the text can't be read or is not
        UTF-8, and `UnavailableError` if the file can't be written.
        """
        dtype = np.min_scalar_type(len(vocabulary) - 1)
        pieces = (vocabulary.encode(piece).astype(dtype) for piece in self.read_pieces())
        if not self.checksum or sources.count_bytes(self.segments) <= LARGE:
            return np.concatenate([np.zeros(0, dtype), *pieces])
        content = json.dumps([__version__, self.name, self.checksum, vocabulary.to_fields()])
        name = f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:32]}.ids"
        path = user_cache.get_path("texts") / name
        try:
            if not path.exists():
                _write_file(path, pieces)
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
            token = vocabulary.tokens[ids[0]]
            if ids[0] == UNKNOWN_ID:
                token = next(split_text(next(self.read_pieces()), self.units, self.stop))
                unknown[token] -= 1
            # A token of bytes may end within a character, which then counts as a later one.
            characters -= len(token.encode("utf-8", "surrogateescape").decode("utf-8", "ignore"))
        # With one byte for the end of each.
        spelled = sum(n * (len(token.encode()) + 1) for token, n in unknown.items())
        return TextSize(len(ids) - (not first), characters, spelled)


@dataclasses.dataclass
class Splits:
    """The text of each split."""

    texts: dict[str, Text]  # By the name of the split.
    sha256: str  # See `sources.split_texts`.

    def resolve(self, data: DataConfig) -> DataConfig:
        """Return the fields with the checksum of this text and absolute paths."""
        path = sources.make_absolute(data.path)
        return dataclasses.replace(data, sha256=self.sha256, path=path)

    def encode(self, vocabulary: Vocabulary) -> tuple[dict[str, Ids], dict[str, TextSize]]:
        """Return the ids of each split; and the sizes of validation and test text.

        These are without the first token, which is never predicted. Raise `UserError` if a split is
        too short.
        """
        ids = {name: text.encode(vocabulary) for name, text in self.texts.items()}
        for name, of_split in ids.items():
            needed = 4 if name == "validation" else 2  # The former is what `zero_state` needs.
            if len(of_split) < needed:
                length = f"{len(of_split)} {vocabulary.token_name}s, and needs {needed}"
                raise UserError(f"the {name} split is too short: it has {length}")
        measured = [(name, text) for name, text in self.texts.items() if name != "train"]
        return ids, {name: text.measure(vocabulary, ids[name]) for name, text in measured}


def load_texts(data: DataConfig) -> Splits:
    """Return the splits that the `data` fields of a config describe, which are read when used.

    Raise `UserError` if a text is missing, empty, or not the one that a run began with.
    """
    any_bytes, ends = data.units == "bytes", data.document_separator == "file"
    if data.path:
        found = sources.find_files(data.path)
        texts = [sources.list_segments(paths, any_bytes, ends) for paths in found]
    elif splits := standard_texts.find_splits(data):
        texts = [sources.list_segments([path], any_bytes, ends) for path in splits]
    else:
        from lstm_jax.data import datasets  # Only for a dataset: importing TFDS takes seconds.

        texts = datasets.read_dataset(data)
    segments, sha256 = sources.split_texts(texts, any_bytes, data.fractions)
    if data.sha256 not in ("", sha256):
        raise UserError(
            "the text is not the one this run was trained on, or is split differently (SHA-256 "
            f"and bytes of each split: {data.sha256} at that time, {sha256} now): restore that "
            "text, or train a new run on this one"
        )
    train = Text(segments["train"], data.units, "").read_pieces
    stop = find_stop_text(data.document_separator, lambda s: any(s in piece for piece in train()))
    split = {
        name: Text(of_split, data.units, stop, name, sha256) for name, of_split in segments.items()
    }
    return Splits(split, sha256)


def load_texts_of_run(
    data: DataConfig, path: str | None = None, directory: str | None = None
) -> dict[str, Text]:
    """Return the splits that a run was trained on, for commands that read its text again.

    Args:
      data: the `data` fields of the run's config.
      path: the current path of its text, or None.
      directory: TFDS's data directory, or None.

    Raises:
      UserError: as `load_texts` does.
    """
    path = data.path if path is None else path
    directory = data.directory if directory is None else directory
    return load_texts(dataclasses.replace(data, path=path, directory=directory)).texts


def read_splits(data: DataConfig) -> dict[str, str]:
    """Read the text of each split into memory, for the `data` fields of a config."""
    return {name: text.read() for name, text in load_texts(data).texts.items()}


def hold_text(text: str, kind: str, stop: str) -> Text:
    """Return a text in memory, with tokens of one of `vocabulary.KINDS` and a stop token or ""."""
    content = text.encode("utf-8", "surrogateescape")
    return Text([Segment(content, 0, len(content))], kind, stop)


def find_stop_text(separator: str, contains: Callable[[str], bool]) -> str:
    """Return the stop token of a text, for a name in `SEPARATORS`.

    `contains` returns whether the text contains a string.
    """
    stop = SEPARATORS[separator]
    windows = stop.replace("\n", "\r\n")
    return windows if stop != windows and not contains(stop) and contains(windows) else stop


def count_ids(ids: Ids, vocabulary_size: int) -> np.ndarray:
    """Return the number of occurrences of each id: int64 [vocabulary]."""
    counts = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(ids), _BLOCK):  # `bincount` makes a copy of 8 bytes for each id.
        counts += np.bincount(ids[start : start + _BLOCK], minlength=vocabulary_size)
    return counts


def _write_file(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """Write the ids of a text; wait if another process writes them. Raise `OSError` if that fails.

    The file gets its name when it is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("ab") as lock:
        if not files.lock_file(lock, f"Waiting for another process that encodes the text: {part}"):
            raise OSError(errno.ENOLCK, "it has no file locks")
        if path.exists():  # The other process has written it.
            return
        try:
            with part.open("wb") as file:  # It may be that of a process that was killed.
                file.writelines(piece.data for piece in pieces)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.truncate(part, 0)
            raise
        part.rename(path)
