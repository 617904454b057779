"""Encode a text in memory, or each chunk of a larger one.

A text is first encoded as indices into its own distinct tokens. This is slow for a large text, and
done only once. A table then maps the indices to ids of a vocabulary. For kind "bpe", the tokens
depend on the vocabulary; so a text is encoded as indices into its words, each of which has several
ids.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import regex

from lstm_jax.config import DataConfig
from lstm_jax.data.sources import Segment, cut_pieces, cut_segments, read_segment
from lstm_jax.vocabulary import BYTES, SEPARATORS, Ids, TextSize, Vocabulary, split_text

# Places where a text can be cut, from the last one backwards ("r"): never within a character (which
# has at most three continuation bytes), nor between two line breaks, which may form a stop token.
# Words and graphemes end at a line break, and before a space between two ASCII letters, in any
# context (Unicode Standard Annex 29, rules GB4, GB5, GB999, WB3a, WB3b and WB999); those of "bpe",
# between anything else and white space.
_AFTER_BREAK = rb"(?<=[\r\n])(?=[^\r\n\x80-\xbf])"
_BEFORE_BREAK = rb"(?<=[^\r\n])(?=[\r\n])"
_SPACE = rb"(?<=[A-Za-z])(?= [A-Za-z])"
_CHARACTER = rb"(?<=[^\r\n])(?=[^\x80-\xbf])|(?<=[\x80-\xbf]{3})(?=.)"
_TOKEN_CUT = regex.compile(b"(?rs)(?<=...)(?:%b|%b|%b)" % (_AFTER_BREAK, _BEFORE_BREAK, _SPACE))
_CHARACTER_CUT = regex.compile(b"(?rs)(?<=...)(?:%b|%b)" % (_AFTER_BREAK, _CHARACTER))
_WIDE_SPACES = "|".join(regex.findall(r"\s", "".join(map(chr, range(0x80, 0xD800))))).encode()
_WORD_CUT = regex.compile(b"(?rs)(?<=...)(?<=[!-~\x80-\xbf])(?<!%b)(?=[ \t\r\n])" % _WIDE_SPACES)
# By kind of tokens; `_TOKEN_CUT` for the others.
_CUTS = {"characters": _CHARACTER_CUT, "bytes": _CHARACTER_CUT, "bpe": _WORD_CUT}


class Part(NamedTuple):
    """An encoded text, or a chunk of one."""

    ids: Any  # Indices into `tokens`: [n], of the smallest dtype.
    tokens: tuple[str, ...]  # The distinct tokens of the text; for kind "bpe", its distinct words.
    counts: np.ndarray  # The number of occurrences of each token: int64.
    characters: int  # The length of the text.


class Table(NamedTuple):
    """The ids of each of the `tokens` of a `Part`: one, or several for a word of kind "bpe"."""

    ids: np.ndarray  # Those of all tokens, one after the other: int32.
    sizes: np.ndarray  # The number of ids of each token: int64.
    firsts: np.ndarray  # The place of the first of them: int64.

    def look_up(self, indices: np.ndarray) -> np.ndarray:
        """Return the ids of a text, for the indices of its tokens."""
        if len(self.ids) == len(self.sizes):
            return self.ids[indices]
        sizes = self.sizes[indices]
        starts = np.cumsum(sizes) - sizes
        return self.ids[np.arange(sizes.sum()) + np.repeat(self.firsts[indices] - starts, sizes)]


@functools.lru_cache(maxsize=1)  # The splits of a prepared text have the same tokens.
def make_table(tokens: tuple[str, ...], vocabulary: Vocabulary) -> Table:
    """Return the ids of each token, or word, of a text in a vocabulary."""
    lengths: list[int] = []

    def divide() -> Iterator[str]:  # Word by word: a list of all would take more memory.
        for token in tokens:
            divided = vocabulary.split_word(token)
            lengths.append(len(divided))
            yield from divided

    ids, sizes = vocabulary.look_up(divide()), np.array(lengths, np.int64)
    return Table(ids, sizes, np.cumsum(sizes) - sizes)


def find_stop_text(separator: str, contains: Callable[[str], bool]) -> str:
    """Return the stop token of a text, for a name in `SEPARATORS`.

    `contains` returns whether the text contains a string.
    """
    stop = SEPARATORS[separator]
    windows = stop.replace("\n", "\r\n")
    return windows if stop != windows and not contains(stop) and contains(windows) else stop


def encode_chunk(text: str, kind: str, stop: str) -> Part:
    """Encode a text, with tokens of one of `vocabulary.KINDS` and a stop token or ""."""
    if kind not in ("characters", "bytes"):
        # A look-up gives each new token the next number.
        index = defaultdict[str, int](itertools.count().__next__)
        ids = np.fromiter(map(index.__getitem__, split_text(text, kind, stop)), np.int32)
        small = ids.astype(np.min_scalar_type(len(index) - 1))
        return Part(small, tuple(index), np.bincount(ids), len(text))
    single, end = text, stop
    if kind == "bytes":
        # In Latin-1 every byte is one character.
        single, end = (t.encode("utf-8", "surrogateescape").decode("latin-1") for t in (text, stop))
    stop_code = None
    if len(end) > 1:
        # The stop token becomes one character that is not in the text.
        stop_code = next(code for code in range(0x100, 0x110000) if chr(code) not in single)
        single = single.replace(end, chr(stop_code))
    # "surrogatepass": a surrogate is a code point like any other here.
    codes = np.frombuffer(single.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.intp)
    counts = np.bincount(codes)
    present = np.flatnonzero(counts)
    table = np.zeros(len(counts), np.min_scalar_type(len(present) - 1))
    table[present] = np.arange(len(present))
    spell = BYTES.__getitem__ if kind == "bytes" else chr
    tokens = tuple(stop if code == stop_code else spell(code) for code in present.tolist())
    return Part(table.take(codes), tokens, counts[present], len(text))


def cut_text(text: list[Segment], kind: str, size: int) -> Iterator[list[Segment]]:
    """Cut a text into chunks that can be encoded one by one.

    A text is cut only where a token ends in any context, so that the tokens of its chunks are those
    of the whole text. A chunk has about `size` bytes, or more if there is no such place.
    """
    pattern, content, start = _CUTS.get(kind, _TOKEN_CUT), bytearray(), 0
    for piece in cut_pieces(text, size // 2):
        content += read_segment(piece)
        if len(content) >= size:
            if match := pattern.search(content, start):
                chunk, text = cut_segments(text, match.start())
                yield chunk
                del content[: match.start()]
            start = max(len(content) - 2, 0)  # All places up to there have been searched.
    if text:
        yield text


class Text:
    """One split of a text, in memory as one chunk. Subclasses may keep it elsewhere."""

    def __init__(self, text: str, kind: str, stop: str) -> None:
        self._text, self._kind, self._stop = text, kind, stop

    @functools.cached_property
    def part(self) -> Part:
        """Return the text as indices into its own tokens; see `encode_chunk`."""
        return encode_chunk(self._text, self._kind, self._stop)

    def encode(self, vocabulary: Vocabulary) -> Ids:
        """Return the ids of the text in a vocabulary with tokens of its kind."""
        return make_table(self.part.tokens, vocabulary).look_up(self.part.ids)

    def read_start(self) -> str:
        """Return the text, or its first 2**20 tokens if it is not in memory."""
        return self._text

    def make_vocabulary(self, data: DataConfig) -> Vocabulary:
        """Return the vocabulary of the text for the `data` fields of a config."""
        counts = dict(zip(self.part.tokens, self.part.counts.tolist(), strict=True))
        size = data.vocabulary_size
        return Vocabulary.from_counts(counts, data.units, data.min_count, self._stop, size)

    def count_tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return the number of occurrences of each token of a vocabulary: int64 [vocabulary]."""
        table = make_table(self.part.tokens, vocabulary)
        counts = np.zeros(len(vocabulary), np.int64)
        np.add.at(counts, table.ids, np.repeat(self.part.counts, table.sizes))
        return counts

    def get_size(self, vocabulary: Vocabulary, first: bool) -> TextSize:
        """Return the size of the text, with or without its first token."""

        def count_unknown(token: str) -> int:
            """Return the bytes of the UTF-8 of an unknown token, with one for its end; else 0."""
            is_known = vocabulary.kind == "bpe" or token in vocabulary
            return 0 if is_known else len(token.encode("utf-8", "surrogateescape")) + 1

        part = self.part
        number = int(part.counts @ make_table(part.tokens, vocabulary).sizes)
        unknown = int(part.counts @ list(map(count_unknown, part.tokens)))
        if first:
            return TextSize(number, part.characters, unknown)
        token = vocabulary.split_word(part.tokens[int(part.ids[:1][0])])[0]
        # A token of bytes may end within a character, which then counts as a later one.
        whole = token.encode("utf-8", "surrogateescape").decode("utf-8", "ignore")
        return TextSize(number - 1, part.characters - len(whole), unknown - count_unknown(token))
