"""Convert text to token ids and back, for characters, words, bytes or subwords."""

import codecs
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import regex

from lstm_jax import bpe
from lstm_jax.errors import UserError

PADDING = ""
UNKNOWN = "[UNK]"
PADDING_ID, UNKNOWN_ID = 0, 1
# Ids without a text, which are never sampled.
SPECIAL_IDS = (PADDING_ID, UNKNOWN_ID)

KINDS = ("characters", "words", "tokens", "bytes", "bpe")
# The default maximum size of a vocabulary of kind "bpe".
DEFAULT_SIZE = 1024
_PATTERNS = {
    # Words by Unicode Standard Annex 29, each with the space before it; between words, characters
    # and line breaks. The first `\w` also keeps `\b` from counting regional indicators, in
    # quadratic time.
    "words": regex.compile(r"(?ws) ?(?=\w)\b.+?\b|\r\n|."),
    # What is between white space, in a text that is divided into tokens already, and line breaks.
    "tokens": regex.compile(r"[^ \t-\r]+|\n"),
    "bpe": bpe.WORDS,
}

# The end of each file, or example of a dataset: a noncharacter of Unicode, for internal use.
FILE_END = "\ufdd0"
# The text between two documents, for each value of data.document_separator.
SEPARATORS = {"": "", "line": "\n", "blank_line": "\n\n", "file": FILE_END}
# The tokens of kind "bytes", and the first ones of kind "bpe".
BYTES = bytes(range(256)).decode("ascii", "surrogateescape")
# The ids of a text, integers [n]: in memory, or mapped from a file.
Ids = np.ndarray


class Vocabulary:
    """The tokens of a text and their ids.

    Id 0 is "" (padding), id 1 is "[UNK]" (any token that is not in the vocabulary), and the tokens
    follow in code-point order. Those of kind "bytes" are always the 256 bytes, so that any file can
    be a text: those above 127 are surrogates, as in Python's "surrogateescape". Those of kind "bpe"
    are the bytes, and then subwords in the order in which they were learned. Those of kind
    "tokens" have one space before each; other white space but line breaks is lost.

    Attributes:
      tokens: the text of each id, special ones included.
      kind: the kind of tokens, one of `KINDS`.
      stop: the stop token, the text between two documents, or "" if there is none.
    """

    def __init__(self, tokens: Sequence[str], kind: str = "characters", stop: str = "") -> None:
        """Make a vocabulary from the token of every id; raise `ValueError` if one is not valid."""
        if list(tokens[: len(SPECIAL_IDS)]) != [PADDING, UNKNOWN]:
            raise ValueError(f"the first two tokens must be {PADDING!r} and {UNKNOWN!r}")
        if kind not in KINDS:
            raise ValueError(f"the kind of tokens must be one of {', '.join(KINDS)}")
        if not all(isinstance(token, str) and token for token in tokens[1:]):
            raise ValueError("every token after the first must be text")
        "".join(tokens).encode("utf-8", "surrogateescape")  # A `ValueError` for other surrogates.
        self._ids = {token: i for i, token in enumerate(tokens)}
        if len(self._ids) != len(tokens):
            raise ValueError("a token occurs twice")
        if stop and stop not in self._ids:
            raise ValueError("the stop token is not among the tokens")
        self.tokens, self.kind, self.stop = tuple(tokens), kind, stop

    @classmethod
    def from_text(
        cls,
        text: str | Iterable[str],
        kind: str = "characters",
        min_count: int = 1,
        stop: str = "",
        size: int = DEFAULT_SIZE,
    ) -> "Vocabulary":
        """Return the vocabulary of a text, which may be in pieces, as of `Text.read_blocks`.

        The tokens are those that occur at least `min_count` times. For kind "bpe", `size` is the
        maximum number of tokens. Raise `UserError` if none occurs often enough, or the stop token
        does not occur.
        """
        counts = count_tokens([text] if isinstance(text, str) else text, kind, stop)
        if stop and not counts.pop(stop, 0):
            name = "end of a file" if stop == FILE_END else repr(stop)
            raise UserError(
                f"the training text has no {name} to end its documents: choose another "
                "--config.data.document_separator"
            )
        frequent = {token for token, count in counts.items() if count >= min_count}
        if kind in ("bytes", "bpe"):
            frequent = set(BYTES)
        if counts and not frequent:
            raise UserError(
                f"none of the {kind} of the training text occurs {min_count} times: lower "
                "--config.data.min_count, or choose other --config.data.units"
            )
        tokens = [PADDING, UNKNOWN, *sorted(frequent | {stop} - {""})]
        if kind == "bpe":
            tokens += bpe.learn_tokens(counts, size - len(tokens), min_count)
        return cls(tokens, kind, stop)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Vocabulary":
        """Return the vocabulary with these fields of JSON; raise `ValueError` if one is wrong."""
        kind, stop, units = (fields.get(name) for name in ("kind", "stop", "units"))
        if not (isinstance(stop, str) and isinstance(units, list)):
            raise ValueError("it does not hold a kind, a stop token and units")
        return cls(units, str(kind), stop)

    def to_fields(self) -> dict[str, Any]:
        """Return the vocabulary as fields of JSON, which `from_fields` reads."""
        return {"kind": self.kind, "stop": self.stop, "units": list(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    @property
    def stop_id(self) -> int | None:
        """Return the id of the stop token, or None."""
        return self._ids[self.stop] if self.stop else None

    def extend(self, other: "Vocabulary") -> "Vocabulary":
        """Return a vocabulary of these tokens with their ids, and then new ones of another one.

        For kind "bpe", only a new stop token is added.
        """
        candidates = [other.stop] if self.kind == "bpe" else other.tokens
        new = (token for token in candidates if token not in self)
        return Vocabulary([*self.tokens, *new], self.kind, other.stop)

    @property
    def token_name(self) -> str:
        """Return the name of a token in the singular: that of its kind, or "token"."""
        return "token" if self.kind == "bpe" or len(self.stop) > 1 else self.kind[:-1]

    def split(self, text: str) -> list[str]:
        """Return the tokens of `text`, whether or not they are in the vocabulary."""
        words = split_text(text, self.kind, self.stop)
        if self.kind != "bpe":
            return list(words)
        parts = ((word,) if word in self._ids else self._split_word(word) for word in words)
        return list(itertools.chain.from_iterable(parts))

    @functools.cached_property
    def _split_word(self) -> Callable[[str], tuple[str, ...]]:
        """Return `bpe.make_splitter` of these tokens; it is cached, since words repeat."""
        others = {*self.tokens[: len(SPECIAL_IDS)], *BYTES, self.stop}
        subwords = [token for token in self.tokens if token not in others]
        return functools.lru_cache(maxsize=2**20)(bpe.make_splitter(subwords))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`: int32 [n], "[UNK]" for tokens not in the vocabulary."""
        indices: Any = slice(None)
        if self.kind == "bpe":
            tokens = self.split(text)
        else:
            tokens, indices = _index_tokens(text, self.kind, self.stop)
        ids = (self._ids.get(token, UNKNOWN_ID) for token in tokens)
        return np.fromiter(ids, np.int32)[indices]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with "[UNK]"; raise `UserError` for an id out of range."""
        return self.make_decoder()(ids, True)

    def make_decoder(self) -> Callable[[Iterable[int], bool], str]:
        """Return a function like `decode`, for ids that arrive in pieces.

        Its second argument is true for the last piece. Until then it holds back the bytes of an
        incomplete character.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

        def decode(ids: Iterable[int], final: bool) -> str:
            ids = [int(i) for i in ids]
            if ids and not 0 <= min(ids) <= max(ids) < len(self.tokens):
                raise UserError(f"ids must be from 0 to {len(self.tokens) - 1}")
            text = "".join(self.tokens[i] for i in ids)
            return utf8.decode(text.encode("utf-8", "surrogateescape"), final)

        return decode

    def name_unknown(self, text: str) -> str:
        """Return the first ten tokens that are not in the vocabulary, for a message, or ""."""
        tokens = sorted(set(self.split(text)) - set(self._ids))
        return ", ".join(map(repr, tokens[:10])) + (", ..." if len(tokens) > 10 else "")


class TextSize(NamedTuple):
    """The numbers of a text that, with a loss, give bits per character."""

    tokens: int
    characters: int  # Unicode characters of the text.
    unknown_bytes: int  # Bytes of all tokens not in the vocabulary, with one for the end of each.


def split_text(text: str, kind: str, stop: str) -> Iterator[str]:
    """Yield the tokens of a text; of kind "bpe", words, which `Vocabulary.split` divides."""
    for number, part in enumerate(text.split(stop) if stop else [text]):
        if number:
            yield stop
        if kind == "tokens":
            words = _PATTERNS[kind].findall(part)
            yield from (token if token == "\n" else f" {token}" for token in words)
        elif kind in _PATTERNS:
            yield from _PATTERNS[kind].findall(part)
        elif kind == "bytes":  # ASCII, and surrogates for the others.
            yield from part.encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")
        else:
            yield from part


def count_tokens(pieces: Iterable[str], kind: str, stop: str) -> Counter[str]:
    """Return the number of occurrences of each token that `split_text` yields, in all pieces."""
    counts = Counter[str]()
    for piece in pieces:
        tokens, indices = _index_tokens(piece, kind, stop)
        counts.update(dict(zip(tokens, np.bincount(indices).tolist(), strict=True)))
    return counts


def _index_tokens(text: str, kind: str, stop: str) -> tuple[list[str], np.ndarray]:
    """Return the distinct tokens that `split_text` yields, and the indices of all, integers [n]."""
    if kind not in ("characters", "bytes") or len(stop.encode()) > 1:
        # A look-up gives each new token the next number.
        index = defaultdict[str, int](itertools.count().__next__)
        indices = np.fromiter(map(index.__getitem__, split_text(text, kind, stop)), np.int32)
        return list(index), indices
    # Three times as fast. "surrogatepass": a surrogate is a code point like any other here.
    if kind == "bytes":
        text = text.encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.intp)
    present = np.bincount(codes) > 0
    return list(map(chr, np.flatnonzero(present))), (np.cumsum(present, dtype=np.int32) - 1)[codes]
