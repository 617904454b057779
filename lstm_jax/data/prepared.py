"""Prepare texts too large for memory: encode them once, in parallel, into files of ids.

A prepared corpus is a directory with the ids of each split (train.npy, ...), the token of each id,
the counts of each token in each split, and a manifest; docs/data.md describes the files. Its ids
number all distinct tokens of the text, or words for data.units=bpe. A table maps them to the ids of
a vocabulary.

A corpus is trusted like the text that it was made from: checking its ids would take as long as
encoding the text again.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lstm_jax.config import DataConfig
from lstm_jax.data import encoding, files, sources, worker
from lstm_jax.data.encoding import Part, Table, Text
from lstm_jax.data.sources import Segment
from lstm_jax.errors import UnavailableError, UserError, name_failure, name_same_command
from lstm_jax.ops.processor import count_cores
from lstm_jax.vocabulary import Ids, Vocabulary

# The directory beside a text. It is hidden, so that patterns like books/** do not match it.
BESIDE = ".lstm_jax"
MANIFEST = "prepared.json"
_TOKENS, _COUNTS = "units.jsonl", "counts.npy"
_PARTS = "parts"
_MAX_PROCESSES = 16
# Approximate bytes of a chunk. Encoding it takes about thirty times this memory.
CHUNK = 2 * 2**20
_PIECE = 2**20  # Tokens of the start of a text.
# Words in a block, of which `SubwordIds` counts the tokens, and blocks that it reads at a time.
_BLOCK, _BLOCKS = 256, 4096

_FileState = list[Any]  # A path or a checksum of a file, and its `_read_stat`.


class Manifest(NamedTuple):
    """The content of `prepared.json`, and its directory."""

    directory: Path
    # Path, relative to the directory, and `_read_stat` of each file of the text.
    sources: list[_FileState]
    checksum: str  # Of the text; see `sources.make_checksum`.
    stop: str  # The stop token, or "".
    characters: dict[str, int]  # Of each split.
    files: dict[str, _FileState]  # SHA-256 and `_read_stat` of each other file in the directory.


def find_corpus(data: DataConfig, save: bool = False) -> Manifest | None:
    """Return the prepared corpus that the `data` fields of a config describe, or None.

    It is found if its sources and its own files have the same sizes, times and inodes as before. If
    only times or inodes differ, checksums decide; if `save`, the new ones are saved.
    """
    texts, states, directory = _locate(data)
    if not _is_directory(directory):
        return None
    try:
        fields = files.read_json(directory / MANIFEST, 2**16 + 8 * len(json.dumps(states)))
        manifest = Manifest(directory, **fields)
        before = manifest.files
        now = {name: _fingerprint(directory / name, known) for name, known in before.items()}
        if any(now[name][:2] != before[name][:2] for name in before):
            return None
        # The sizes first, which need no reading.
        if [state[:2] for state in states] != [state[:2] for state in manifest.sources]:
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if states != manifest.sources and sources.split_files(texts, data)[1] != manifest.checksum:
        return None
    if save and (states, now) != (manifest.sources, before):
        with contextlib.suppress(OSError):
            files.write_json(directory / MANIFEST, {**fields, "sources": states, "files": now})
    return manifest


def prepare_corpus(data: DataConfig) -> Manifest:
    """Return the prepared corpus that the `data` fields of a config describe; make it if missing.

    If another process is making it, wait. Raise `UnavailableError` if the directory can't be
    written, and `UserError` as `texts.load_texts`.
    """
    *_, directory = _locate(data)
    base = directory.parent
    if not data.prepared and base.is_symlink():
        raise UserError(f"{base} is a link: set data.prepared to the directory itself")
    try:
        if corpus := find_corpus(data, save=True):
            return corpus
        base.mkdir(parents=True, exist_ok=True)
        with files.open_append(base / f".{directory.name}.lock") as lock:
            files.lock_file(lock, f"Waiting for another process that prepares the text in {base}")
            return find_corpus(data) or _prepare(data)  # Another process may have made it.
    except OSError as error:
        raise UnavailableError(
            f"can't prepare the text in {base} ({error.strerror or error}): free space or make it "
            "writable, or use another directory (data.prepared; XDG_CACHE_HOME for a run's text)"
        ) from None


def _locate(data: DataConfig) -> tuple[list[list[Path]], list[_FileState], Path]:
    """Return the files of a text, their states, and the directory of its prepared corpus.

    The paths in the states are relative to the directory, so that all can be moved.
    """
    texts = sources.find_files(data.path)
    base = Path(os.path.abspath(os.path.expanduser(data.prepared) or texts[0][0].parent / BESIDE))
    names = [[os.path.relpath(path, base) for path in text] for text in texts]
    fractions = data.fractions if len(texts) == 1 else None
    content = json.dumps([names, data.units, data.document_separator, fractions]).encode()
    name = hashlib.sha256(content).hexdigest()[:16]
    directory = base / f"{texts[0][0].stem[:50]}-{name}"
    states: list[_FileState] = []
    for path in itertools.chain.from_iterable(texts):
        with name_failure(f"can't read {path}"):
            states.append([os.path.relpath(path, directory), *_read_stat(path.stat())])
    return texts, states, directory


def _read_stat(status: os.stat_result) -> list[int]:
    """Return numbers that change when the file changes; no program can set `ctime`."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _fingerprint(path: Path, known: _FileState) -> _FileState:
    """Return SHA-256 and state of a file, `known` if its state is unchanged; flush a new file."""
    with files.open_regular(path) as file:
        state = _read_stat(os.fstat(file.fileno()))
    return known if state == known[1:] else [files.hash_file(path, sync=not known), *state]


def _is_directory(path: Path) -> bool:
    """Return whether a path is a directory, and not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def _prepare(data: DataConfig) -> Manifest:
    """Encode the text in parts, and merge them."""
    began = time.monotonic()
    texts, states, directory = _locate(data)
    total = sum(state[1] for state in states)
    print(f"Preparing {total / 1e6:,.0f} MB of text, once, in {directory}", file=sys.stderr)
    split, sha256 = sources.split_files(texts, data)
    sources.check_unchanged(sha256, data.sha256)
    chunks = [list(encoding.cut_text(text, data.units, CHUNK)) for text in split]

    def contains(part: str) -> bool:
        """Return whether the training text contains a string; no chunk ends within a stop token."""
        contents = (b"".join(map(sources.read_segment, chunk)) for chunk in chunks[0])
        return any(part.encode() in content for content in contents)

    stop = encoding.find_stop_text(data.document_separator, contains)
    flat = list(itertools.chain.from_iterable(chunks))
    plan = {"units": data.units, "stop": stop, "chunks": flat}
    with files.unfinished_directory(directory) as unfinished:
        parts = unfinished / _PARTS
        parts.mkdir()
        (parts / worker.PLAN).write_text(json.dumps(plan))
        _run_processes(parts, len(flat), total)
        characters = _merge(parts, unfinished, chunks)
        shutil.rmtree(parts)
        sources.check_lengths(characters, data.path)
        if _locate(data)[1] != states:
            raise UserError(
                f"files of {data.path} have changed while they were prepared: start again"
            )
        made = {path.name: _fingerprint(path, []) for path in unfinished.iterdir()}
        manifest = Manifest(directory, states, sha256, stop, characters, made)
        fields = manifest._asdict()
        del fields["directory"]
        files.write_json(unfinished / MANIFEST, fields)
        # A corpus of another text, or a damaged one; or a link.
        shutil.rmtree(directory) if _is_directory(directory) else directory.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    rate = f"{total / 1e6 / seconds:,.0f} MB/s"
    print(f"Prepared {total / 1e6:,.0f} MB in {seconds:.1f} s, {rate}", file=sys.stderr)
    return manifest


def _run_processes(parts: Path, number: int, total: int) -> None:
    """Encode all chunks (`number` of them, of `total` bytes) on all cores."""
    workers = min(count_cores(), _MAX_PROCESSES, number)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        # One thread each; NumPy would start one per core for matmuls that it never computes.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-m", "lstm_jax.data.worker", str(parts)]
    options: dict[str, Any] = {"env": environment, "process_group": 0}  # Ctrl-C is not for them.
    reader, writer = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with (
            os.fdopen(reader) as lines,
            tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ):
            with os.fdopen(writer, "wb") as output:
                for i in range(workers):
                    arguments = [*command, str(i), str(workers)]
                    processes.append(subprocess.Popen(arguments, stdout=output, **options))
            for line in lines:  # Of all processes, until the last has ended.
                printed = json.loads(line)
                if isinstance(printed, int):
                    bar.update(printed)
                elif "mistake" in printed:
                    raise UserError(printed["mistake"])
                else:
                    raise OSError(0, printed["unavailable"])
        if any(process.wait() for process in processes):
            raise UserError(
                "a process that prepared the text has ended early, perhaps out of memory: free "
                f"some, then start {name_same_command()} again"
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _merge(parts: Path, target: Path, chunks: list[list[list[Segment]]]) -> dict[str, int]:
    """Join the encoded chunks of each split, with one table of tokens; return their characters."""

    def load_parts(split: int) -> Iterator[Part]:
        first = sum(map(len, chunks[:split]))
        for number in range(first, first + len(chunks[split])):
            yield worker.load_part(parts, number)

    index: dict[str, int] = {}
    characters, lengths = dict.fromkeys(sources.SPLITS, 0), [0] * len(chunks)
    for i, name in enumerate(characters):
        for part in load_parts(i):
            characters[name] += part.characters
            lengths[i] += len(part.ids)
            for token in part.tokens:
                index.setdefault(token, len(index))
    dtype = np.min_scalar_type(len(index) - 1)
    counts = np.zeros((len(chunks), len(index)), np.int64)
    for i, name in enumerate(characters):
        with (target / f"{name}.npy").open("xb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (lengths[i],)})
            for part in load_parts(i):
                table = np.array([index[token] for token in part.tokens], dtype)
                counts[i][table] += part.counts
                file.write(table.take(part.ids).data)
    np.save(target / _COUNTS, counts)
    with (target / _TOKENS).open("xb") as file:
        file.writelines(json.dumps(token).encode() + b"\n" for token in index)
    return characters


def open_splits(manifest: Manifest) -> dict[str, Text]:
    """Return the splits of a prepared corpus, which share its tokens."""
    directory = manifest.directory
    try:
        with files.open_regular(directory / _TOKENS) as lines:
            tokens = tuple(map(json.loads, lines))
        with files.open_regular(directory / _COUNTS) as file:
            counts = dict(zip(sources.SPLITS, np.load(file), strict=True))
        return {name: PreparedText(manifest, name, tokens, counts[name]) for name in counts}
    except (ValueError, LookupError, TypeError, EOFError, RecursionError):
        raise UserError(f"{directory} is damaged: remove it, and start again") from None


class PreparedText(Text):
    """One split of a prepared corpus. Only the requested parts of it are read into memory."""

    def __init__(
        self, manifest: Manifest, name: str, tokens: tuple[str, ...], counts: np.ndarray
    ) -> None:
        self._stop = manifest.stop
        table = np.arange(len(tokens), dtype=np.int32)
        self._ids = FileIds(manifest.directory / f"{name}.npy", table)
        self.part = Part(self._ids, tokens, counts, manifest.characters[name])

    def encode(self, vocabulary: Vocabulary) -> Ids:
        """See `Text`."""
        table = encoding.make_table(self.part.tokens, vocabulary)
        if vocabulary.kind == "bpe":
            return SubwordIds(self._ids, table)
        return self._ids.look_up_in(table.ids)

    def read_start(self) -> str:
        """See `Text`."""
        part = self.part
        spelled = "".join([part.tokens[i] for i in part.ids[:_PIECE].tolist()])
        # A token may be a byte, so the last character may be incomplete.
        return spelled.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


class FileIds:
    """`Ids` that are read from a file on demand, and looked up in a table.

    They are not cached, so that memory is constant for a file of any size. The pages of a
    memory-mapped file would count as memory of the process.
    """

    def __init__(self, path: Path, table: np.ndarray) -> None:
        """Open a .npy file of indices into the table, int32 [tokens]."""
        self._path, self._table, self._file = path, table, files.open_regular(path)
        np.lib.format.read_magic(self._file)
        (self._length,), _, self._dtype = np.lib.format.read_array_header_1_0(self._file)
        self._first = self._file.tell()

    def look_up_in(self, table: np.ndarray) -> "FileIds":
        """Return the same indices of the same file, looked up in another table."""
        ids = copy.copy(self)
        ids._table = table
        return ids

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, np.ndarray):
            return self._read(index[:, 0], index.shape[1])
        start, stop, step = index.indices(self._length)
        return self._read(np.array([start]), max(stop - start, 0))[0, ::step]

    def _read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` ids from each place: int32 [starts, length]."""
        file, width = self._file.fileno(), self._dtype.itemsize
        places = (self._first + starts * width).tolist()
        # `pread` is thread-safe; it reads less than 2 GiB from each place.
        with name_failure(f"can't read {self._path}"):
            content = b"".join([os.pread(file, length * width, place) for place in places])
        try:
            ids = self._table.take(np.frombuffer(content, self._dtype))
            return ids.reshape(len(starts), length)
        except (IndexError, ValueError):  # The file is shorter, or has other numbers.
            raise UserError(f"{self._path} has changed while it was read: start again") from None


class SubwordIds:
    """`Ids` of a text of words with several tokens each, which are read as `FileIds` are."""

    def __init__(self, words: FileIds, table: Table) -> None:
        """Look the words up in the table, once, to count the tokens in each block of words."""
        self._words, self._table = words, table
        counts = [np.zeros(1, np.int64)]
        for start in range(0, len(words), _BLOCK * _BLOCKS):
            sizes = table.sizes[words[start : start + _BLOCK * _BLOCKS]]
            counts.append(np.add.reduceat(sizes, np.arange(0, len(sizes), _BLOCK)))
        # Block k has the tokens from self._bounds[k] to self._bounds[k + 1].
        self._bounds = np.cumsum(np.concatenate(counts))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, np.ndarray):
            time = index.shape[1]
            return np.stack([self[start : start + time] for start in index[:, 0].tolist()])
        start, stop, step = index.indices(len(self))
        first, last = np.searchsorted(self._bounds, [start, stop - 1], side="right") - 1
        ids = self._table.look_up(self._words[first * _BLOCK : (last + 1) * _BLOCK])
        begin = self._bounds[first]
        return ids[start - begin : max(stop - begin, 0) : step]
