"""Text to ids and back, in characters, graphemes, words or bytes."""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import regex

from lstm_jax.errors import UserError

PADDING = ""
UNKNOWN = "[UNK]"
PADDING_ID, UNKNOWN_ID = 0, 1
# Ids that stand for no text; sampling never yields them.
SPECIAL_IDS = (PADDING_ID, UNKNOWN_ID)

KINDS = ("characters", "graphemes", "words", "bytes")
_PATTERNS = {
    # What a reader takes for one character (Unicode Standard Annex 29): accents stay with their
    # letters, and emoji whole.
    "graphemes": regex.compile(r"\X"),
    # Words by the same annex, each with the space before it, and graphemes for all between words.
    "words": regex.compile(r"(?ws) ?\b\w.*?\b|\X"),
}


# What stands between two documents of a text. A file's end is a code point that Unicode keeps for
# programs' own use ("file": after each file, or each example of a dataset).
FILE_END = "\ufdd0"
SEPARATORS = MappingProxyType({"": "", "line": "\n", "blank_line": "\n\n", "file": FILE_END})
# The units of kind "bytes".
_BYTES = bytes(range(256)).decode("ascii", "surrogateescape")
# What a terminal obeys instead of showing it.
_CONTROL = regex.compile(r"(?!\r\n|[\n\t])\p{Cc}")


class Ids(Protocol):
    """Token ids of a text: an int32 array [n], or whatever has its length and its slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Vocabulary:
    """The units of a text and their ids.

    Id 0 is "" (padding), id 1 is "[UNK]" (any unit not in the vocabulary), and the units follow in
    code-point order. Where the text is made of documents, one unit is the stop token: the text that
    stands between two of them, such as a blank line.

    A byte that is no part of UTF-8 stands in a `str` as Python's "surrogateescape" has it, so that
    any file at all can be a text. The units of kind "bytes" are always the 256 bytes.

    Attributes:
      units: the text of each id, special ones included.
      kind: what a unit is, one of `KINDS`.
      stop: the stop token's text, or "" where there is none.
    """

    def __init__(self, units: Sequence[str], kind: str = "characters", stop: str = "") -> None:
        """Takes the text of every id.

        Raises:
          ValueError: if the special units are not in front, the stop token is no unit, or a unit
            stands twice or is none of its kind.
        """
        if list(units[: len(SPECIAL_IDS)]) != [PADDING, UNKNOWN]:
            raise ValueError(f"the first two units must be {PADDING!r} and {UNKNOWN!r}")
        proper = units[len(SPECIAL_IDS) :]
        if kind not in KINDS:
            raise ValueError(f"the kind of units must be one of {', '.join(KINDS)}")
        if not all(isinstance(unit, str) and unit for unit in proper):
            raise ValueError("every unit after the first two must be text")
        single = kind in ("characters", "bytes")
        for unit in proper:
            if unit == stop or not single:
                fits = _is_unicode(unit)
            else:
                fits = len(unit) == 1 and (unit in _BYTES if kind == "bytes" else _is_unicode(unit))
            if not fits:
                raise ValueError(f"every unit after the first two must be one of the {kind}")
        self._ids = {unit: i for i, unit in enumerate(units)}
        if len(self._ids) != len(units):
            raise ValueError("a unit stands twice")
        if stop and stop not in proper:
            raise ValueError("the stop token is not among the units")
        self.tokens = tuple(units)
        self.kind = kind
        self.stop = stop
        if single:
            # Encoding is one gather from this table, indexed by code point.
            self._table = np.full(0x110000, UNKNOWN_ID, np.int32)
            for unit in proper:
                if len(unit) == 1:
                    self._table[ord(unit)] = self._ids[unit]

    @classmethod
    def from_text(
        cls, text: str, kind: str = "characters", min_count: int = 1, stop: str = ""
    ) -> "Vocabulary":
        """The vocabulary of all units that stand in `text` `min_count` times or more.

        Raises:
          UserError: as `from_counts` does.
        """
        # All bytes are units, whether they stand in the text or not.
        counts = (
            {stop: text.count(stop)} if kind == "bytes" else Counter(split_text(text, kind, stop))
        )
        return cls.from_counts(counts.items(), kind, min_count, stop)

    @classmethod
    def from_counts(
        cls, counts: Iterable[tuple[str, int]], kind: str, min_count: int, stop: str
    ) -> "Vocabulary":
        """The vocabulary of a text, from how often each unit stands in it.

        Raises:
          UserError: if no unit stands there often enough, or the stop token does not at all.
        """
        units, tokens, stops = set(), 0, 0
        for unit, count in counts:
            tokens += count
            stops += count if unit == stop else 0
            if count >= min_count:
                units.add(unit)
        if stop == FILE_END and not stops:
            raise UserError(
                "the training text has no end of a file: data.document_separator=file needs "
                "several files, of which one ends within the training text"
            )
        if stop and not stops:
            raise UserError(
                f"the training text has no {stop!r}, which is to end its documents: "
                "choose another data.document_separator"
            )
        if kind == "bytes":
            units = set(_BYTES)
        if tokens and not units:
            raise UserError(
                f"none of the {kind} of the training text stands there {min_count} times: "
                "lower data.min_count"
            )
        return cls([PADDING, UNKNOWN, *sorted(units | {stop} - {""})], kind, stop)

    def extended(self, other: "Vocabulary") -> "Vocabulary":
        """These units with their ids, and after them those of `other` that are new.

        Raises:
          UserError: if the units are of another kind, or documents end otherwise.
        """
        if self.kind != other.kind:
            raise UserError(
                f"the weights to start from are those of a model of {self.kind}: set "
                f"data.units={self.kind}, or start from others"
            )
        if self.stop not in ("", other.stop):
            raise UserError(
                f"documents of the model to start from end with {self.stop!r}: set "
                "data.document_separator as it was there, or start from others"
            )
        new = (unit for unit in other.tokens if unit not in self._ids)
        return Vocabulary([*self.tokens, *new], self.kind, other.stop)

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: if it is not such a text.
        """
        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(content, dict) or set(content) != {"kind", "stop", "units"}:
            raise ValueError("it does not hold a kind, a stop token and units")
        if not isinstance(content["units"], list) or not isinstance(content["stop"], str):
            raise ValueError("its units are no list, or its stop token is no text")
        return cls(content["units"], content["kind"], content["stop"])

    def to_json(self) -> str:
        """The vocabulary as JSON text, in ASCII."""
        content = {"kind": self.kind, "stop": self.stop, "units": self.tokens}
        return json.dumps(content, indent=0) + "\n"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def stop_id(self) -> int | None:
        """The id of the stop token, or None where there is none."""
        return self._ids[self.stop] if self.stop else None

    @property
    def token_name(self) -> str:
        """What one of them is called: "character", "word" and so on.

        Where a stop token of several characters is among them, that is "token".
        """
        return "token" if len(self.stop) > 1 else self.kind[:-1]

    def split(self, text: str) -> list[str]:
        """The units that `text` is made of, known or not.

        Joined they are the text again, but for bytes that are no ASCII: each is a unit of its own.
        """
        return list(split_text(text, self.kind, self.stop))

    def look_up(self, units: Iterable[str]) -> np.ndarray:
        """The id of each unit: int32 [n], "[UNK]" for those not in the vocabulary."""
        return np.fromiter((self._ids.get(unit, UNKNOWN_ID) for unit in units), np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`: int32 [n], "[UNK]" for units not in the vocabulary."""
        if self.kind in _PATTERNS:
            return self.look_up(split_text(text, self.kind, self.stop))
        if not self.stop:
            return self._encode_characters(text)
        parts = text.split(self.stop)
        arrays = [np.array([self._ids[self.stop]], np.int32)] * (2 * len(parts) - 1)
        arrays[::2] = map(self._encode_characters, parts)
        return np.concatenate(arrays)

    def _encode_characters(self, text: str) -> np.ndarray:
        if self.kind == "bytes":
            text = _one_character_a_byte(text)
        # "surrogatepass": a surrogate is a code point like any other here.
        return self._table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. "" vanishes, "[UNK]" is written as that."""
        return self.decoder()(ids, True)

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        """A `decode` for ids that come piece by piece.

        Its second argument tells whether the ids are the last. Until then it holds back the bytes
        of a character whose end is still to come; joined, its texts are what `decode` gives.
        """
        if self.kind != "bytes":
            return lambda ids, final: "".join(self.tokens[int(i)] for i in ids)
        utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

        def decode(ids: Iterable[int], final: bool) -> str:
            units = "".join(self.tokens[int(i)] for i in ids)
            return utf8.decode(units.encode("utf-8", "surrogateescape"), final)

        return decode

    def unknown(self, text: str) -> list[str]:
        """The different units of `text` that are not in the vocabulary, sorted."""
        return sorted(set(split_text(text, self.kind, self.stop)) - set(self._ids))


class Costs(NamedTuple):
    """What bits per character need to know of a text, besides its loss.

    Attributes:
      characters: Unicode characters of a text.
      unknown_bytes: bytes of all units that the vocabulary lacks, with one for the end of each.
    """

    characters: int
    unknown_bytes: int


def count_spelled_bytes(unit: str) -> int:
    """The bytes of a unit's UTF-8, and one for its end."""
    return len(unit.encode("utf-8", "surrogateescape")) + 1


def find_stop_text(separator: str, text: str) -> str:
    """What ends a document of `text`, for a name out of `SEPARATORS`."""
    stop = SEPARATORS[separator]
    windows = stop.replace("\n", "\r\n")
    return windows if stop not in text and windows in text else stop


def make_printable(text: str) -> str:
    r"""Return a text as a person can read it on a terminal.

    Bytes that are not UTF-8 become U+FFFD, control characters escapes such as \x1b (but for line
    breaks and tabs), and the end of a file a blank line.
    """
    text = regex.sub("[\ud800-\udfff]", "\ufffd", escape_controls(text))
    return text.replace(FILE_END, "\n\n")


def make_printer() -> Callable[[str, bool], str]:
    r"""Return a `make_printable` for a text that comes piece by piece.

    Its second argument says whether the piece is the last. Until then it holds back a final \r,
    which is half a line break if \n follows.
    """
    held = ""

    def show(piece: str, final: bool) -> str:
        nonlocal held
        text = held + piece
        held = "\r" if text.endswith("\r") and not final else ""
        return make_printable(text.removesuffix(held))

    return show


def escape_controls(text: str) -> str:
    r"""Return a text with escapes such as \x1b for control characters.

    Line feeds, tabs and the \r before a line feed stay.
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def split_text(text: str, kind: str, stop: str) -> Iterator[str]:
    """The units of a text, one after the other."""
    for number, part in enumerate(text.split(stop) if stop else [text]):
        if number:
            yield stop
        if kind in _PATTERNS:
            yield from _PATTERNS[kind].findall(part)
        else:
            yield from _one_character_a_byte(part) if kind == "bytes" else part


def _is_unicode(text: str) -> bool:
    """Return whether a text has a UTF-8, as one with surrogates has not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_character_a_byte(text: str) -> str:
    """A text whose characters are the bytes of this one: ASCII, and surrogates for the others."""
    return text.encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")
