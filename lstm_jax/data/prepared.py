"""Texts too large for memory: encoded once, in parallel, into files of ids that are read at random.

A prepared corpus is a directory, most often in `.lstm_jax` beside the first file of its text:

    train.npy, validation.npy, test.npy   the ids of each split, of the smallest dtype that holds
                                          all units (numpy.load(..., mmap_mode="r") reads them)
    units.jsonl                           the text of each id, a JSON string a line
    counts.npy                            how often each stands in each split, int64 [3, units]
    prepared.json                         what it was made of, checksums, and a seal

The seal is made with a key of the user's own (in `cache_directory`). A corpus that somebody else
made or changed counts as not there: to check that its ids are those of the text would take as long
as to encode the text again.

Its ids are those of all units of the text, in the order in which they were met. The vocabulary of a
run, with its least count and with what units a model knew before, is a table from them to its ids.
"""

import contextlib
import fcntl
import functools
import hashlib
import hmac
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lstm_jax.data import corpus, encoding
from lstm_jax.data.encoding import Segment
from lstm_jax.errors import UnavailableError, UserError
from lstm_jax.run import files
from lstm_jax.vocabulary import SEPARATORS, UNKNOWN_ID, Costs, Vocabulary, count_spelled_bytes

# The directory beside a text; a hidden one, which no pattern like books/** meets.
BESIDE = ".lstm_jax"
MANIFEST = "prepared.json"
_UNITS, _COUNTS = "units.jsonl", "counts.npy"
_UNFINISHED = ".unfinished"
# Part of a corpus's name, so that what another version of this code prepared is not read.
_FORMAT = 2
_KEY, _KEY_BYTES = "key", 32
_MOST_PROCESSES = 16


class Manifest(NamedTuple):
    """What `prepared.json` holds, and where.

    Attributes:
      directory: of the prepared corpus.
      sources: the files of the one text, or of each split: path from `directory`, and `_state`.
      text_sha256: of the text, as `corpus.compute_checksum` gives it.
      units: see `data.units`.
      ends: whether each file ends with `vocabulary.FILE_END`.
      stop: the stop token, or "".
      splits: of each, `bytes`, `characters`, `tokens`, and the id of its `first` unit.
      files: SHA-256 and `_state` of each other file in the directory.
    """

    directory: Path
    sources: list[list[list[Any]]]
    text_sha256: str
    units: str
    ends: bool
    stop: str
    splits: dict[str, dict[str, Any]]
    files: dict[str, list[Any]]

    @classmethod
    def read(cls, directory: Path, limit: int) -> "Manifest":
        """Raises `OSError` or `ValueError` if there is none of the user's own in `limit` bytes."""
        fields = files.read_json(directory / MANIFEST, limit)
        if fields.pop("seal", None) != _seal(directory, fields):
            raise ValueError("it is not sealed with this user's key")
        return cls(directory, **fields)

    def write(self, directory: Path) -> None:
        """Writes it, whole or not at all."""
        fields = self._asdict()
        del fields["directory"]
        files.write_json(directory / MANIFEST, {**fields, "seal": _seal(self.directory, fields)})

    def paths(self) -> list[list[Path]]:
        """Of the sources."""
        return [[_resolve(self.directory / s[0]) for s in text] for text in self.sources]


def cache_directory() -> Path:
    """Return the directory of the user's key, and of corpora for texts of other people's runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "lstm-jax", "prepared").absolute()


@functools.cache
def _key(directory: Path) -> bytes:
    """Return the key in a cache directory; one for this process only if none can be kept there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / _KEY) as file:
            os.fchmod(file.fileno(), 0o600)  # Nobody else may read it.
            if os.fstat(file.fileno()).st_size != _KEY_BYTES:
                file.truncate(0)
                file.write(secrets.token_bytes(_KEY_BYTES))
        return files.read_bytes(directory / _KEY, _KEY_BYTES)
    except OSError:
        return secrets.token_bytes(_KEY_BYTES)


def _owner() -> str:
    """Return a name for the user's key; "" if it is not kept, so that no directory is left over."""
    directory = cache_directory()
    key = _key(directory)
    return hashlib.sha256(key).hexdigest() if (directory / _KEY).exists() else ""


def _seal(directory: Path, fields: dict[str, Any]) -> str:
    """Return a checksum that only this user can make, for a directory of this name."""
    content = json.dumps([directory.name, fields], sort_keys=True).encode()
    return hmac.digest(_key(cache_directory()), content, "sha256").hex()


def count_bytes(data: ConfigDict) -> int:
    """The bytes of all files in `data.path` together; raises `UserError` if one is missing."""
    paths = [path for text in corpus.find_files(data.path) for path in text]
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


def find_corpus(data: ConfigDict) -> Manifest | None:
    """Return the prepared corpus that the `data` fields of a config describe, or None.

    It is there if this user has made it, and its sources and its own files have the size, the
    times and the inodes that they had. Where others than the size differ, checksums decide.

    Raises:
      UserError: if the text can't be read.
    """
    _, _, sources, directory = _locate(data)
    return _find(directory, sources)


def prepare_corpus(data: ConfigDict) -> Manifest:
    """The prepared corpus that the `data` fields of a config describe, made if it isn't there yet.

    If it is another process that is making it, it is waited for. A preparation that was interrupted
    goes on.

    Raises:
      UserError: if the text can't be read, is not UTF-8 or too short; or if it is not the one that
        a run began with (`data.sha256`).
      UnavailableError: if the directory can't be written.
    """
    texts, base, sources, directory = _locate(data)
    if not data.prepared and base.is_symlink():
        raise UserError(f"{base} is a link: name the directory to prepare in with data.prepared")
    try:
        if found := _find(directory, sources, keep=True):
            return found
        base.mkdir(parents=True, exist_ok=True)
        with _lock(base / f".{directory.name}.lock"):
            # Another process may have made it meanwhile.
            return _find(directory, sources) or _prepare(data, texts, sources, directory)
    except OSError as error:
        raise UnavailableError(
            f"can't prepare the text in {base} ({error.strerror}): make room or make it writable, "
            "or name another directory in data.prepared"
        ) from None


_Sources = list[list[list[Any]]]


def _locate(data: ConfigDict) -> tuple[list[list[Path]], Path, _Sources, Path]:
    """Return the files of a text, where it is prepared, its `Manifest.sources` and directory."""
    texts = corpus.find_files(data.path)
    base = os.path.expanduser(data.prepared) or texts[0][0].absolute().parent / BESIDE
    base = _resolve(Path(base).absolute())
    sources = [[_source(path, base) for path in text] for text in texts]
    what = {
        "format": _FORMAT,
        "owner": _owner(),  # Several users or machines don't replace the corpora of each other.
        "sources": [[source[0] for source in text] for text in sources],
        "units": data.units,
        "separator": data.document_separator,
        "fractions": list(data.fractions) if len(texts) == 1 else None,
    }
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    # The paths of sources are those from inside the directory, so that all can be moved together.
    sources = [[[os.path.join("..", path), *state] for path, *state in t] for t in sources]
    return texts, base, sources, base / f"{texts[0][0].stem[:50]}-{name}"


def _resolve(path: Path) -> Path:
    """The path without "..", links kept as they are."""
    return Path(os.path.normpath(path))


def _source(path: Path, base: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    return [os.path.relpath(path.absolute(), base), *_state(status)]


def _state(status: os.stat_result) -> list[int]:
    """Return numbers that differ once a file was changed; nobody can set the time of `ctime`."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[BinaryIO]:
    """Waits for a lock on a file and holds it; the operating system ends it with the process."""
    with files.open_append(path) as file:
        with contextlib.suppress(OSError):  # A file system without locks.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _find(directory: Path, sources: _Sources, keep: bool = False) -> Manifest | None:
    """Return the corpus in `directory` if it is whole, this user's own, and that of the sources.

    Args:
      directory: where it is.
      sources: as they are now.
      keep: whether to write there that the checksums were the same, so that it is quicker next
        time.
    """
    if not _is_directory(directory):
        return None
    try:
        manifest = Manifest.read(directory, limit=2**16 + 8 * len(json.dumps(sources)))
        own = {name: _check(directory / name, *rest) for name, rest in manifest.files.items()}
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if sources != manifest.sources:
        before = [[source[:2] for source in text] for text in manifest.sources]
        if before != [[source[:2] for source in text] for text in sources]:
            return None
        if _checksum(manifest) != manifest.text_sha256:
            return None
    if keep and (sources != manifest.sources or own != manifest.files):
        with contextlib.suppress(OSError):
            manifest._replace(sources=sources, files=own).write(directory)
    return manifest


def _check(path: Path, sha256: str, *state: int) -> list[Any]:
    """Return SHA-256 and state of a file now; raise `ValueError` if its content is another."""
    with files.open_regular(path) as file:
        now = _state(os.fstat(file.fileno()))
        same = now == list(state)
        if not same and (now[0] != state[0] or _digest(file) != sha256):
            raise ValueError(f"{path} has changed")
    return [sha256, *now]


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _is_directory(path: Path) -> bool:
    """Return whether it is a directory, and no link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def _remove(path: Path) -> None:
    """Remove a directory, a file or a link, whichever it is, if it is there."""
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checksum(manifest: Manifest) -> str:
    digest = hashlib.sha256()
    for paths in manifest.paths():
        text = encoding.list_segments(paths, manifest.units == "bytes", manifest.ends)
        for _, content in encoding.iterate_chunks(text, "bytes", encoding.CHUNK):
            digest.update(content)
    return digest.hexdigest()


def _prepare(
    data: ConfigDict,
    texts: list[list[Path]],
    sources: _Sources,
    directory: Path,
) -> Manifest:
    """Makes the corpus beside its place, and moves it there when it is whole."""
    began = time.monotonic()
    total = sum(source[1] for text in sources for source in text)
    _tell(f"Preparing {total / 1e6:,.0f} MB of text, once, in {directory}")
    ends = data.document_separator == "file"
    splits, sha256 = _plan(data, texts, ends)
    corpus.check_unchanged(sha256, data)
    stop = _find_stop(data, splits["train"])
    unfinished = directory.with_name(directory.name + _UNFINISHED)
    plan = {
        "sha256": sha256,
        "units": data.units,
        "ends": ends,
        "stop": stop,
        "chunks": [chunk for chunks in splits.values() for chunk in chunks],
    }
    key = _begin(unfinished, plan)
    _run_processes(unfinished, len(plan["chunks"]), total, key)
    measured = _merge(unfinished, splits, key)
    corpus.check_lengths({name: m["characters"] for name, m in measured.items()}, data.path)
    if [[_source(path, directory) for path in text] for text in texts] != sources:
        raise UserError(f"files of {data.path} have changed while they were prepared: start again")
    shutil.rmtree(unfinished / encoding.PARTS)
    own = [f"{name}.npy" for name in corpus.SPLITS] + [_UNITS, _COUNTS]
    manifest = Manifest(
        directory=directory,
        sources=sources,
        text_sha256=sha256,
        units=data.units,
        ends=ends,
        stop=stop,
        splits=measured,
        files={name: _sync(unfinished / name) for name in own},
    )
    manifest.write(unfinished)
    (unfinished / encoding.PLAN).unlink()
    _remove(directory)  # That of another text, or a damaged one.
    unfinished.rename(directory)
    files.sync_directory(directory.parent)
    seconds = time.monotonic() - began
    _tell(f"Prepared {total / 1e6:,.0f} MB in {seconds:.1f} s, {total / 1e6 / seconds:,.0f} MB/s")
    return manifest


def _tell(message: str) -> None:
    # Standard output is for what a command was asked.
    print(message, file=sys.stderr, flush=True)


def _plan(
    data: ConfigDict, texts: list[list[Path]], ends: bool
) -> tuple[dict[str, list[list[Segment]]], str]:
    """The chunks of each split, and SHA-256 over the text, from one reading of it."""
    digest = hashlib.sha256()
    any_bytes = data.units == "bytes"
    planned: list[list[list[Segment]]] = []
    lengths: list[int] = []  # Of the chunks of the last text, in characters or bytes.
    for paths in texts:
        chunks, lengths = [], []
        text = encoding.list_segments(paths, any_bytes, ends)
        for chunk, content in encoding.iterate_chunks(
            text, data.units, encoding.CHUNK, digest.update
        ):
            chunks.append(chunk)
            lengths.append(len(content) if any_bytes else encoding.count_characters(content))
        planned.append(chunks)
    if len(texts) == 1:
        planned = _split(
            planned[0], lengths, corpus.find_cuts(sum(lengths), data.fractions), any_bytes
        )
    return dict(zip(corpus.SPLITS, planned, strict=True)), digest.hexdigest()


def _split(
    chunks: list[list[Segment]], lengths: list[int], places: Sequence[int], in_bytes: bool
) -> list[list[list[Segment]]]:
    """Cuts a text at places in characters, or in bytes."""
    splits: list[list[list[Segment]]] = [[]]
    at, places = 0, list(places)
    for chunk, length in zip(chunks, lengths, strict=True):
        cut = 0  # Bytes of the chunk that are in splits before.
        while places and places[0] < at + length:
            place = places.pop(0) - at
            if not in_bytes:
                content = b"".join(map(encoding.read_segment, chunk))
                place = encoding.find_character(content, place)
            before, _ = encoding.cut_segments(encoding.cut_segments(chunk, cut)[1], place - cut)
            splits[-1] += [before] if before else []
            splits.append([])
            cut = place
        splits[-1].append(encoding.cut_segments(chunk, cut)[1])
        at += length
    return splits + [[] for _ in places]


def _find_stop(data: ConfigDict, train: list[list[Segment]]) -> str:
    """What ends a document, as `vocabulary.stop_text` finds it; no chunk ends within one."""
    stop = SEPARATORS[data.document_separator]
    windows = stop.replace("\n", "\r\n")

    def stands(text: str) -> bool:
        wanted = text.encode()
        return any(wanted in b"".join(map(encoding.read_segment, chunk)) for chunk in train)

    return windows if stop != windows and not stands(stop) and stands(windows) else stop


def _begin(unfinished: Path, plan: dict[str, Any]) -> bytes:
    """Make the directory to work in; chunks from an earlier preparation of the same plan stay.

    Returns:
      The key that seals the chunks of this plan, so that no others are taken for them.
    """
    content = json.dumps(plan).encode()
    path, parts = unfinished / encoding.PLAN, unfinished / encoding.PARTS
    same = _is_directory(unfinished) and _is_directory(parts)
    try:
        same = same and files.read_bytes(path, len(content)) == content
    except OSError:
        same = False
    if not same:
        _remove(unfinished)
        parts.mkdir(parents=True)
        files.write_file(path, content)
    for left in unfinished.iterdir():
        if left not in (path, parts):
            _remove(left)
    return hmac.digest(_key(cache_directory()), content, "sha256")


def _run_processes(unfinished: Path, chunks: int, total: int, key: bytes) -> None:
    """Encodes all chunks, on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    number = max(1, min(cores or 1, _MOST_PROCESSES, chunks))
    root = str(Path(encoding.__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        # One thread each; NumPy would make as many as there are cores for products it never does.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        encoding.KEY: key.hex(),
    }
    reader, writer = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lstm_jax.data.encoding", str(unfinished), str(i), str(number)],
            stdout=writer,
            env=environment,
        )
        for i in range(number)
    ]
    os.close(writer)
    try:
        with (
            os.fdopen(reader) as lines,
            tqdm(
                total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
            ) as bar,
        ):
            for line in lines:  # Of all of them, until the last has ended.
                told = json.loads(line)
                if isinstance(told, int):
                    bar.update(told)
                elif "mistake" in told:
                    raise UserError(told["mistake"])
                else:
                    raise OSError(0, told["unavailable"])
        if any(process.wait() for process in processes):
            raise UserError(
                "a process that prepared the text has ended too early, perhaps for want of "
                "memory: the same command goes on from there"
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _merge(
    unfinished: Path, splits: dict[str, list[list[Segment]]], key: bytes
) -> dict[str, dict[str, Any]]:
    """Join the encoded chunks of each split, one set of units for all; `Manifest.splits`."""
    index: dict[str, int] = {}
    counts = np.zeros((len(splits), 1024), np.int64)
    measured: dict[str, dict[str, Any]] = {}
    number = itertools.count()
    for row, (name, chunks) in enumerate(splits.items()):
        split = {"bytes": 0, "characters": 0, "tokens": 0, "first": 0}
        for chunk in chunks:
            part = _load(unfinished, next(number), chunk, key)
            places = [index.setdefault(unit, len(index)) for unit in part.units]
            if len(index) > counts.shape[1]:
                counts = np.pad(counts, ((0, 0), (0, max(len(index), counts.shape[1]))))
            counts[row, places] += part.counts
            if not split["tokens"]:
                split["first"] = places[part.ids[0]]
            split["bytes"] += encoding.count_bytes(chunk)
            split["characters"] += part.characters
            split["tokens"] += len(part.ids)
        measured[name] = split
    dtype = _dtype(len(index))
    number = itertools.count()
    for name, chunks in splits.items():
        with (unfinished / f"{name}.npy").open("xb") as file:
            np.lib.format.write_array_header_1_0(
                file,
                {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (measured[name]["tokens"],),
                },
            )
            for chunk in chunks:
                part = _load(unfinished, next(number), chunk, key)
                table = np.array([index[unit] for unit in part.units], dtype)
                file.write(table[part.ids].data)
    with (unfinished / _COUNTS).open("xb") as file:
        np.save(file, counts[:, : len(index)])
    with (unfinished / _UNITS).open("x", encoding="ascii") as lines:
        lines.writelines(json.dumps(unit) + "\n" for unit in index)
    return measured


def _dtype(units: int) -> np.dtype:
    """Return the smallest dtype that holds the ids of so many units."""
    return np.min_scalar_type(max(units - 1, 0))


def _load(unfinished: Path, number: int, chunk: list[Segment], key: bytes) -> encoding.Part:
    path = encoding.part_path(unfinished, number)
    part = encoding.load_part(path, chunk, key)
    if part is None:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} was damaged and is removed: the same command goes on from there")
    return part


def _sync(path: Path) -> list[Any]:
    """Return SHA-256 and state of a file that is now safely on the disk."""
    with files.open_regular(path) as file:
        os.fsync(file.fileno())
        return [_digest(file), *_state(os.fstat(file.fileno()))]


class PreparedText:
    """A `texts.Text` of which no more is in memory than is asked for."""

    def __init__(self, manifest: Manifest, name: str) -> None:
        """Takes a prepared corpus, and which split of it."""
        self._manifest = manifest
        self._name = name
        self._split = manifest.splits[name]

    def _units(self) -> Iterator[str]:
        with files.open_regular(self._manifest.directory / _UNITS) as lines:
            yield from map(json.loads, lines)

    def _counts(self) -> np.ndarray:
        """How often each unit stands in the split: int64 [units]."""
        row = corpus.SPLITS.index(self._name)
        with files.open_regular(self._manifest.directory / _COUNTS) as file:
            return np.load(file)[row]

    def vocabulary(self, data: ConfigDict) -> Vocabulary:
        """See `texts.Text`."""
        counts = zip(self._units(), self._counts().tolist(), strict=True)
        return Vocabulary.from_counts(counts, data.units, data.min_count, self._manifest.stop)

    def encode(self, vocabulary: Vocabulary) -> "FileIds":
        """See `texts.Text`."""
        table = vocabulary.look_up(self._units())
        path = self._manifest.directory / f"{self._name}.npy"
        return FileIds(path, self._split["tokens"], table)

    def costs(self, vocabulary: Vocabulary, first: bool = True) -> Costs:
        """See `texts.Text`."""
        ids = vocabulary.look_up(self._units()).tolist()
        unknown = sum(
            count * count_spelled_bytes(unit)
            for unit, unit_id, count in zip(
                self._units(), ids, self._counts().tolist(), strict=True
            )
            if unit_id == UNKNOWN_ID
        )
        characters = self._split["characters"]
        if not first:
            unit = next(itertools.islice(self._units(), self._split["first"], None))
            characters -= len(unit)
            if vocabulary.look_up([unit])[0] == UNKNOWN_ID:
                unknown -= count_spelled_bytes(unit)
        return Costs(characters, unknown)

    def pieces(self, overlap: int) -> Iterator[str]:
        """See `texts.Text`."""
        manifest = self._manifest
        any_bytes = manifest.units == "bytes"
        names = list(corpus.SPLITS)
        texts = [encoding.list_segments(p, any_bytes, manifest.ends) for p in manifest.paths()]
        if len(texts) == 1:
            (text,) = texts
            before = sum(
                manifest.splits[name]["bytes"] for name in names[: names.index(self._name)]
            )
            text = encoding.cut_segments(text, before)[1]
            text = encoding.cut_segments(text, self._split["bytes"])[0]
        else:
            text = texts[names.index(self._name)]
        tail = ""
        for chunk, _ in encoding.iterate_chunks(text, manifest.units, encoding.CHUNK):
            piece = tail + encoding.decode_chunk(chunk, any_bytes, manifest.ends)
            yield piece
            tail = piece[len(piece) - overlap :] if overlap else ""


class FileIds:
    """Ids in a file, read where they are asked for and looked up in a table: `texts.Ids`.

    What was read is not kept, so that memory is constant whatever the size of the file; a mapped
    file's pages would count as the process's own.
    """

    def __init__(self, path: Path, length: int, table: np.ndarray) -> None:
        """Takes a file that ends with `length` ids, and what to make of each: int32 [units]."""
        self._path, self._length, self._table = path, length, table
        self._dtype = _dtype(len(table))
        self._file = files.open_regular(path)
        size = os.fstat(self._file.fileno()).st_size
        self._first = max(size - length * self._dtype.itemsize, 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(self._length)
        return self._read(np.array([start]), max(stop - start, 0))[0, ::step]

    def cut(self, starts: np.ndarray, length: int) -> np.ndarray:
        """So many ids from each place on: int32 [starts, length]."""
        return self._read(starts, length)

    def _read(self, starts: np.ndarray, length: int) -> np.ndarray:
        file, width = self._file.fileno(), self._dtype.itemsize
        places = (self._first + starts * width).tolist()
        content = b"".join([encoding.read_at(file, place, length * width) for place in places])
        try:
            ids = self._table.take(np.frombuffer(content, self._dtype))
            return ids.reshape(len(starts), length)
        except (IndexError, ValueError):  # There is less, or there are other numbers.
            raise UserError(f"{self._path} has changed while it was read: start again") from None
