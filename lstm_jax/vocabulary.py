"""Text to ids and back."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

PADDING = ""
UNKNOWN = "[UNK]"
PADDING_ID, UNKNOWN_ID = 0, 1
# Ids that stand for no text; sampling never yields them.
SPECIAL_IDS = (PADDING_ID, UNKNOWN_ID)


class Vocabulary:
    """Characters (Unicode code points) and their ids.

    Id 0 is "" (padding), id 1 is "[UNK]" (any character not in the vocabulary), and the characters
    follow in code-point order.

    Attributes:
      units: the text of each id, special ones included.
    """

    def __init__(self, units: Sequence[str]) -> None:
        """Takes the text of every id.

        Raises:
          ValueError: if the special units are not in front, or a unit is not one character, or
            stands twice.
        """
        characters = units[len(SPECIAL_IDS) :]
        if list(units[: len(SPECIAL_IDS)]) != [PADDING, UNKNOWN]:
            raise ValueError(f"the first two units must be {PADDING!r} and {UNKNOWN!r}")
        if any(not isinstance(unit, str) or len(unit) != 1 for unit in characters):
            raise ValueError("every unit after the first two must be one character")
        if len(set(characters)) != len(characters):
            raise ValueError("a unit stands twice")
        self.units = tuple(units)
        # Encoding a text is one gather from this table, indexed by code point.
        self._ids = np.full(0x110000, UNKNOWN_ID, np.int32)
        self._ids[[ord(unit) for unit in characters]] = np.arange(len(SPECIAL_IDS), len(units))

    @classmethod
    def from_text(cls, text: str) -> "Vocabulary":
        """The vocabulary of all characters in `text`."""
        return cls([PADDING, UNKNOWN, *sorted(set(text))])

    def extended(self, other: "Vocabulary") -> "Vocabulary":
        """These units with their ids, and after them those of `other` that are new."""
        known = set(self.units)
        return Vocabulary([*self.units, *(unit for unit in other.units if unit not in known)])

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: if it is not such a text.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("units"), list):
            raise ValueError("there is no list of units in it")
        return cls(content["units"])

    def to_json(self) -> str:
        """The vocabulary as JSON text."""
        return json.dumps({"units": self.units}, ensure_ascii=False, indent=0) + "\n"

    def __len__(self) -> int:
        return len(self.units)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`: int32 [len(text)], "[UNK]" for characters not in the vocabulary."""
        # "surrogatepass": a lone surrogate is a code point like any other here, and unknown.
        return self._ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. "" vanishes, "[UNK]" is written as that."""
        return "".join(self.units[int(i)] for i in ids)

    def unknown(self, text: str) -> str:
        """The different characters of `text` that are not in the vocabulary, sorted."""
        return "".join(sorted(set(text) - set(self.units)))
