"""Find the fenced blocks of the docs, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A fenced block of a page, and the comment above it."""

    page: Path
    comment: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Return the commands that begin with python, as lists of arguments."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        matches = (re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(python .*)", line) for line in lines)
        return [shlex.split(match[1], comments=True) for match in matches if match]


def find_blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of a page."""
    fence = re.compile(
        r"^(?:<!-- (?P<comment>.*?) -->\n)?\s*```[^\n]*\n(?P<text>.*?)^\s*```$", re.M | re.S
    )
    content = page.read_text(encoding="utf-8")
    return [Block(page, match["comment"] or "", match["text"]) for match in fence.finditer(content)]
