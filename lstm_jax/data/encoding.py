"""A text of any size to ids, chunk by chunk: the work of the processes that prepare a corpus.

`python -m lstm_jax.data.encoding DIRECTORY NUMBER TOTAL` encodes every TOTAL-th chunk of a plan.
Each process has little more than NumPy to load, so that many of them cost little memory.

A text is cut only where its units come apart whatever stands on both sides, so that the ids of its
chunks, one after the other, are those of the whole text.
"""

import hmac
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lstm_jax.errors import UserError
from lstm_jax.run import files
from lstm_jax.vocabulary import FILE_END, split_text

PLAN, PARTS = "plan.json", "parts"
# The environment variable that holds the key of `save_part`, in hexadecimal.
KEY = "LSTM_JAX_PARTS_KEY"
_SEAL_BYTES = 32
# Bytes of text that are encoded at a time: they take about thirty times as much memory meanwhile.
CHUNK = 2 * 2**20
# A chunk ends at the last good place; most often one stands within so many bytes of its end.
_NEAR = 2**16
_FILE_END = FILE_END.encode()
_BOM = b"\xef\xbb\xbf"


class Segment(NamedTuple):
    """Bytes `start` to `stop` of a file; of `FILE_END`, where the path is ""."""

    path: str
    start: int
    stop: int


class Part(NamedTuple):
    """An encoded chunk.

    Attributes:
      ids: indices into `units`, [tokens], of the smallest dtype.
      units: the different units of the chunk.
      counts: how often each stands in it, int64.
      characters: the length of the chunk.
    """

    ids: np.ndarray
    units: list[str]
    counts: np.ndarray
    characters: int


def list_segments(paths: Iterable[Path], any_bytes: bool, ends: bool) -> list[Segment]:
    """A text that is made of files, as `corpus.read_files` reads it.

    Raises:
      UserError: if a file is empty or can't be read.
    """
    found = []
    for path in paths:
        try:
            with files.open_regular(path, follow=True) as file:
                has_bom = file.read(len(_BOM)) == _BOM
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        if not size:
            raise UserError(f"{path} is empty: data.path must name files with text in them")
        # A byte-order mark is no part of the text.
        found.append(Segment(str(path), len(_BOM) if has_bom and not any_bytes else 0, size))
        if ends:
            found.append(Segment("", 0, len(_FILE_END)))
    return found


def read_segment(segment: Segment) -> bytes:
    """The bytes of a segment.

    Raises:
      UserError: if they can't be read.
    """
    if not segment.path:
        return _FILE_END[segment.start : segment.stop]
    try:
        with files.open_regular(Path(segment.path), follow=True) as file:
            content = read_at(file.fileno(), segment.start, segment.stop - segment.start)
    except OSError as error:
        raise UserError(f"can't read {segment.path}: {error.strerror}") from None
    if len(content) < segment.stop - segment.start:
        raise UserError(f"{segment.path} has become shorter while it was read")
    return content


def read_at(descriptor: int, start: int, length: int) -> bytes:
    """Return `length` bytes of a file, or fewer at its end."""
    content = os.pread(descriptor, length, start)
    while 0 < len(content) < length:  # Linux reads at most 2 GiB at a time.
        more = os.pread(descriptor, length - len(content), start + len(content))
        if not more:
            break
        content += more
    return content


def cut_segments(chunk: list[Segment], at: int) -> tuple[list[Segment], list[Segment]]:
    """What stands before byte `at` of a text, and what after it."""
    before, after = [], []
    for path, start, stop in chunk:
        middle = min(max(start + at, start), stop)
        if start < middle:
            before.append(Segment(path, start, middle))
        if middle < stop:
            after.append(Segment(path, middle, stop))
        at -= stop - start
    return before, after


def iterate_chunks(
    text: list[Segment], units: str, size: int, hear: Callable[[bytes], None] | None = None
) -> Iterator[tuple[list[Segment], bytes]]:
    """Cuts a text into chunks of about `size` bytes, and yields each with its content.

    Args:
      text: the text.
      units: what it is to be encoded in, one of `vocabulary.KINDS`.
      size: of a chunk; one that can't be cut is longer.
      hear: called with all bytes, piece by piece, in order.
    """
    pending: list[Segment] = []
    content = bytearray()
    full = size
    for path, start, stop in text:
        while start < stop:
            piece = Segment(path, start, min(stop, start + full - len(content)))
            more = read_segment(piece)
            if hear:
                hear(more)
            content += more
            if pending and pending[-1].path == path and pending[-1].stop == start:
                # A character may stand on both sides.
                piece = Segment(path, pending.pop().start, piece.stop)
            pending.append(piece)
            start = piece.stop
            if len(content) < full:
                continue
            if at := last_cut(content, units):
                chunk, pending = cut_segments(pending, at)
                yield chunk, bytes(content[:at])
                del content[:at]
            # What is left can't be cut, so that more is needed than there is.
            full = (len(content) // size + 1) * size
    if pending:
        yield pending, bytes(content)


def last_cut(content: bytes | bytearray, units: str) -> int:
    """The last place within a text where it can be cut; 0 if there is none.

    A cut is never within a character, nor between two line breaks, which may be a stop token
    together. Words and graphemes come apart at a line break, and at a space between two ASCII
    letters, whatever else stands around (Unicode Standard Annex 29, rules GB4, GB5, GB999, WB3a,
    WB3b and WB999).
    """
    for near in (_NEAR, len(content)):
        first = max(len(content) - near, 0)
        text = np.frombuffer(bytes(content[first:]), np.uint8)
        if len(text) < 5:
            break
        # The places of which three bytes stand before: 3, 4, ...
        continues = (text & 0xC0) == 0x80
        # After three bytes that continue a character another one is no part of it.
        whole = ~continues[3:] | continues[2:-1] & continues[1:-2] & continues[:-3]
        breaks = (text == ord("\n")) | (text == ord("\r"))
        before, after = breaks[2:-1], breaks[3:]
        if units in ("words", "graphemes"):
            letters = ((text | 0x20) - ord("a")) < 26  # What is below "a" wraps around.
            next_is_letter = np.append(letters[4:], False)
            spaces = letters[2:-1] & (text[3:] == ord(" ")) & next_is_letter
            good = whole & ((before ^ after) | spaces)
        else:
            good = whole & ~(before & after)
        places = np.flatnonzero(good)
        if len(places):
            return first + 3 + int(places[-1])
    return 0


def count_characters(content: bytes) -> int:
    """How many characters a UTF-8 text has."""
    return int(np.count_nonzero(_begins(content)))


def find_character(content: bytes, number: int) -> int:
    """The byte at which a character of a UTF-8 text begins, or would."""
    return int(np.append(np.flatnonzero(_begins(content)), len(content))[number])


def _begins(content: bytes) -> np.ndarray:
    """Which bytes begin a character: all but 0b10xxxxxx, which as signed are those below -64."""
    return np.frombuffer(content, np.int8) >= -64


def decode_chunk(chunk: list[Segment], any_bytes: bool, ends: bool) -> str:
    """The text of a chunk.

    Raises:
      UserError: if it is not UTF-8, or if files hold what is to stand at their ends.
    """
    if any_bytes:
        text = b"".join(map(read_segment, chunk)).decode("utf-8", "surrogateescape")
        found = text.count(FILE_END)
    else:
        parts = []
        for segment in chunk:
            try:
                parts.append(read_segment(segment).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{segment.path} is not UTF-8 at byte {segment.start + error.start}: convert "
                    "it, for example with iconv -f LATIN1 -t UTF-8, or learn its bytes with "
                    "data.units=bytes"
                ) from None
        text = "".join(parts)
        found = text.count(FILE_END) if ends else 0
    whole_ends = sum(not path and stop - start == len(_FILE_END) for path, start, stop in chunk)
    if ends and found > whole_ends:
        raise UserError("a file holds U+FDD0, which stands for the end of a file here: remove it")
    return text


def encode_chunk(text: str, units: str, stop: str) -> Part:
    """The ids of a text in units of its own."""
    if units in ("words", "graphemes"):
        index: dict[str, int] = {}
        numbers = (index.setdefault(unit, len(index)) for unit in split_text(text, units, stop))
        ids = np.fromiter(numbers, np.int32)
        return Part(_smallest(ids, len(index)), list(index), np.bincount(ids), len(text))
    single, end = text, stop
    if units == "bytes":
        # In Latin-1 every byte is one character.
        single, end = (t.encode("utf-8", "surrogateescape").decode("latin-1") for t in (text, stop))
    stop_code = None
    if len(end) > 1:
        # The stop token becomes one character, which the text does not have.
        stop_code = next(code for code in range(0x100, 0x110000) if chr(code) not in single)
        single = single.replace(end, chr(stop_code))
    codes = _code_points(single)
    counts = np.bincount(codes)
    present = np.flatnonzero(counts)
    table = np.zeros(len(counts), np.min_scalar_type(max(len(present) - 1, 0)))
    table[present] = np.arange(len(present))

    def unit(code: int) -> str:
        if code == stop_code:
            return stop
        return bytes([code]).decode("ascii", "surrogateescape") if units == "bytes" else chr(code)

    return Part(table[codes], [unit(code) for code in present.tolist()], counts[present], len(text))


def _smallest(ids: np.ndarray, number: int) -> np.ndarray:
    """Ids below `number` in the smallest dtype that holds them."""
    return ids.astype(np.min_scalar_type(max(number - 1, 0)))


def _code_points(text: str) -> np.ndarray:
    """The code points of a text: uint8 or uint32, [characters]."""
    try:
        return np.frombuffer(text.encode("latin-1"), np.uint8)
    except UnicodeEncodeError:
        # "surrogatepass": a surrogate is a code point like any other here.
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def save_part(path: Path, part: Part, key: bytes) -> None:
    """Write an encoded chunk, whole or not at all, sealed with a key."""
    units = np.frombuffer(json.dumps(part.units).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(
        content, ids=part.ids, units=units, counts=part.counts, characters=np.int64(part.characters)
    )
    files.write_file(path, _seal(path, content.getvalue(), key) + content.getbuffer())


def load_part(path: Path, chunk: list[Segment], key: bytes) -> Part | None:
    """Return what `save_part` wrote of a chunk; None if it is not there, damaged, or another's."""
    try:
        # Ids, units and counts take less than 32 bytes for each byte of text.
        content = files.read_bytes(path, 2**16 + 32 * count_bytes(chunk))
    except OSError:
        return None
    seal, content = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
    if not hmac.compare_digest(seal, _seal(path, content, key)):
        return None
    with np.load(io.BytesIO(content)) as arrays:
        units = json.loads(arrays["units"].tobytes())
        return Part(arrays["ids"], units, arrays["counts"], int(arrays["characters"]))


def _seal(path: Path, content: bytes, key: bytes) -> bytes:
    """Return a checksum that only who has the key can make, for one content in one place."""
    return hmac.digest(key, path.name.encode() + content, "sha256")


def count_bytes(chunk: Iterable[Segment]) -> int:
    """Return how many bytes a chunk has."""
    return sum(segment.stop - segment.start for segment in chunk)


def part_path(directory: Path, number: int) -> Path:
    """Where the chunk of this number is kept."""
    return directory / PARTS / f"{number:06}.npz"


def main() -> None:
    """Encodes the chunks of this process, and prints a line with the bytes of each.

    The parent process answers Ctrl-C, and ends this one. It is told a mistake, and that the disk
    is full, as a JSON object with the message.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory, number, total = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    plan = json.loads((directory / PLAN).read_text(encoding="utf-8", errors="surrogateescape"))
    key = bytes.fromhex(os.environ[KEY])
    any_bytes = plan["units"] == "bytes"
    try:
        for i in range(number, len(plan["chunks"]), total):
            chunk = [Segment(*segment) for segment in plan["chunks"][i]]
            path = part_path(directory, i)
            if load_part(path, chunk, key) is None:
                text = decode_chunk(chunk, any_bytes, plan["ends"])
                save_part(path, encode_chunk(text, plan["units"], plan["stop"]), key)
            _tell(count_bytes(chunk))
    except UserError as error:
        _tell({"mistake": str(error)})
    except BrokenPipeError:  # The parent process is gone.
        os._exit(1)
    except OSError as error:
        _tell({"unavailable": error.strerror})


def _tell(content: Any) -> None:
    # In one piece: all processes write to the same pipe.
    os.write(sys.stdout.fileno(), f"{json.dumps(content)}\n".encode())


if __name__ == "__main__":
    main()
