"""Texts too large for memory: encoded once, in parallel, into files of ids that are read at random.

A prepared corpus is a directory, most often in `.lstm_jax` beside the first file of its text:

    train.npy, validation.npy, test.npy   the ids of each split, of the smallest dtype that holds
                                          all units (numpy.load(..., mmap_mode="r") reads them)
    units.jsonl                           the text of each id, a JSON string a line
    counts.npy                            how often each stands in each split, int64 [3, units]
    prepared.json                         what it was made of, and checksums

Its ids are those of all units of the text, in the order in which they were met. The vocabulary of a
run, with its least count and with what units a model knew before, is a table from them to its ids.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lstm_jax import corpus, encoding, files
from lstm_jax.encoding import Segment
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import SEPARATORS, UNKNOWN_ID, Costs, Vocabulary, spelled_bytes

# The directory beside a text; a hidden one, which no pattern like books/** meets.
BESIDE = ".lstm_jax"
MANIFEST = "prepared.json"
_UNITS, _COUNTS = "units.jsonl", "counts.npy"
_UNFINISHED = ".unfinished"
# Part of a corpus's name, so that what another version of this code has prepared is not read.
_FORMAT = 1
_MOST_PROCESSES = 16


class Manifest(NamedTuple):
    """What `prepared.json` holds, and where.

    Attributes:
      directory: of the prepared corpus.
      sources: the files of the one text, or of each split: path from `directory`, size in bytes,
        time of the last change in nanoseconds.
      text_sha256: of the text, as `corpus.checksum` gives it.
      units: see `data.units`.
      ends: whether each file ends with `vocabulary.FILE_END`.
      stop: the stop token, or "".
      splits: of each, `bytes`, `characters`, `tokens`, and the text of its `first` unit.
      files: size, time of the last change and SHA-256 of each other file in the directory.
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
    def read(cls, directory: Path) -> "Manifest":
        """Raises `OSError` or `ValueError` if there is none that is whole."""
        fields = files.read_json(directory / MANIFEST)
        return cls(directory, **{name: fields[name] for name in cls._fields[1:]})

    def write(self, directory: Path) -> None:
        """Writes it, whole or not at all."""
        fields = self._asdict()
        del fields["directory"]
        files.write_json(directory / MANIFEST, fields)

    def paths(self) -> list[list[Path]]:
        """Of the sources."""
        return [[_resolve(self.directory / s[0]) for s in text] for text in self.sources]


def size(data: ConfigDict) -> int:
    """The bytes of all files in `data.path` together; raises `UserError` if one is missing."""
    paths = [path for text in corpus.find_files(data.path) for path in text]
    return sum(path.stat().st_size for path in paths if path.is_file())


def prepare(data: ConfigDict) -> Manifest:
    """The prepared corpus that the `data` fields of a config describe, made if it isn't there yet.

    It is there if its sources have the size and time of last change that they had; where these
    differ, the checksum of the text decides. The same holds for its own files. If it is another
    process that is making it, it is waited for. A preparation that was interrupted goes on.

    Raises:
      UserError: if the text can't be read, is not UTF-8 or too short; if it is not the one that a
        run began with (`data.sha256`); or if the directory can't be written.
    """
    texts = corpus.find_files(data.path)
    base = Path(data.prepared or texts[0][0].absolute().parent / BESIDE)
    base = _resolve(base.expanduser().absolute())
    sources = [[_stamp(path, base) for path in text] for text in texts]
    what = {
        "format": _FORMAT,
        "sources": [[source[0] for source in text] for text in sources],
        "units": data.units,
        "separator": data.document_separator,
        "fractions": list(data.fractions) if len(texts) == 1 else None,
    }
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    directory = base / f"{texts[0][0].stem}-{name}"
    # The paths of sources are those from inside the directory, so that all can be moved together.
    sources = [[[os.path.join("..", path), *stamp] for path, *stamp in t] for t in sources]
    found = _find(directory, sources)
    if found:
        return found
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _lock(base / f".{directory.name}.lock"):
            # Another process may have made it meanwhile.
            return _find(directory, sources) or _prepare(data, texts, sources, directory)
    except OSError as error:
        raise UserError(
            f"can't prepare the text in {base} ({error.strerror}): make room or make it writable, "
            "or name another directory in data.prepared"
        ) from None


def _resolve(path: Path) -> Path:
    """The path without "..", links kept as they are."""
    return Path(os.path.normpath(path))


def _stamp(path: Path, base: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    return [os.path.relpath(path.absolute(), base), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for a lock and holds it; the operating system ends it with the process."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # A file system without locks.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find(directory: Path, sources: list[list[list[Any]]]) -> Manifest | None:
    """The corpus in `directory` if it is whole and that of the sources."""
    try:
        manifest = Manifest.read(directory)
    except (OSError, ValueError, KeyError):
        return None
    own = {}
    for name, (length, changed, sha256) in manifest.files.items():
        status = _status(directory / name)
        if status is None or status.st_size != length:
            return None
        if status.st_mtime_ns != changed and _digest(directory / name) != sha256:
            return None
        own[name] = [length, status.st_mtime_ns, sha256]
    if sources != manifest.sources:
        if [[s[:2] for s in text] for text in sources] != [
            [s[:2] for s in text] for text in manifest.sources
        ]:
            return None
        if _checksum(manifest) != manifest.text_sha256:
            return None
    if sources != manifest.sources or own != manifest.files:
        manifest = manifest._replace(sources=sources, files=own)
        with contextlib.suppress(OSError):  # It is only slower next time.
            manifest.write(directory)
    return manifest


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: Manifest) -> str:
    digest = hashlib.sha256()
    for paths in manifest.paths():
        text = encoding.segments(paths, manifest.units == "bytes", manifest.ends)
        for _, content in encoding.chunks(text, "bytes", encoding.CHUNK):
            digest.update(content)
    return digest.hexdigest()


def _prepare(
    data: ConfigDict,
    texts: list[list[Path]],
    sources: list[list[list[Any]]],
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
    _begin(unfinished, plan)
    _run_processes(unfinished, len(plan["chunks"]), total)
    measured = _merge(unfinished, {name: len(chunks) for name, chunks in splits.items()})
    for name, chunks in splits.items():
        measured[name]["bytes"] = sum(s.stop - s.start for chunk in chunks for s in chunk)
    corpus.check_lengths({name: m["characters"] for name, m in measured.items()}, data.path)
    now = [[_stamp(path, directory)[1:] for path in text] for text in texts]
    if now != [[source[1:] for source in text] for text in sources]:
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
        files={name: _seal(unfinished / name) for name in own},
    )
    manifest.write(unfinished)
    (unfinished / encoding.PLAN).unlink()
    if directory.exists():  # That of another text, or a damaged one.
        shutil.rmtree(directory)
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
        text = encoding.segments(paths, any_bytes, ends)
        for chunk, content in encoding.chunks(text, data.units, encoding.CHUNK, digest.update):
            chunks.append(chunk)
            lengths.append(len(content) if any_bytes else encoding.count_characters(content))
        planned.append(chunks)
    if len(texts) == 1:
        planned = _split(planned[0], lengths, corpus.cuts(sum(lengths), data.fractions), any_bytes)
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
                content = b"".join(map(encoding.read, chunk))
                place = encoding.find_character(content, place)
            before, _ = encoding.cut(encoding.cut(chunk, cut)[1], place - cut)
            splits[-1] += [before] if before else []
            splits.append([])
            cut = place
        splits[-1].append(encoding.cut(chunk, cut)[1])
        at += length
    return splits + [[] for _ in places]


def _find_stop(data: ConfigDict, train: list[list[Segment]]) -> str:
    """What ends a document, as `vocabulary.stop_text` finds it; no chunk ends within one."""
    stop = SEPARATORS[data.document_separator]
    windows = stop.replace("\n", "\r\n")

    def stands(text: str) -> bool:
        wanted = text.encode()
        return any(wanted in b"".join(map(encoding.read, chunk)) for chunk in train)

    return windows if stop != windows and not stands(stop) and stands(windows) else stop


def _begin(unfinished: Path, plan: dict[str, Any]) -> None:
    """Makes the directory to work in; what is there from an earlier preparation of the same stays.

    Chunks are whole where they are there at all, so no more than the plan has to be the same.
    """
    content = json.dumps(plan).encode()
    path = unfinished / encoding.PLAN
    if not path.exists() or path.read_bytes() != content:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        files.write(path, content)
    (unfinished / encoding.PARTS).mkdir(exist_ok=True)


def _run_processes(unfinished: Path, chunks: int, total: int) -> None:
    """Encodes all chunks, on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    number = max(1, min(cores or 1, _MOST_PROCESSES, chunks))
    root = str(Path(encoding.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        # One thread each; NumPy would make as many as there are cores for products it never does.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    reader, writer = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lstm_jax.encoding", str(unfinished), str(i), str(number)],
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
                if isinstance(told, str):
                    raise UserError(told)
                bar.update(told)
        if any(process.wait() for process in processes):
            raise UserError(
                "a process that prepared the text has ended too early, perhaps for want of "
                "memory: the same command goes on from there"
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _merge(unfinished: Path, chunks: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Joins the encoded chunks of each split, one set of units for all; what a manifest tells."""
    index: dict[str, int] = {}
    counts = np.zeros((len(chunks), 1024), np.int64)
    measured: dict[str, dict[str, Any]] = {}
    number = 0
    for row, (name, n) in enumerate(chunks.items()):
        split: dict[str, Any] = {"characters": 0, "tokens": 0, "first": ""}
        for i in range(number, number + n):
            part = _load(unfinished, i)
            places = [index.setdefault(unit, len(index)) for unit in part.units]
            if len(index) > counts.shape[1]:
                counts = np.pad(counts, ((0, 0), (0, max(len(index), counts.shape[1]))))
            counts[row, places] += part.counts
            split["characters"] += part.characters
            split["tokens"] += len(part.ids)
            if i == number:
                split["first"] = part.units[part.ids[0]]
        measured[name] = split
        number += n
    dtype = np.min_scalar_type(max(len(index) - 1, 0))
    number = 0
    for name, n in chunks.items():
        with (unfinished / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file,
                {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (measured[name]["tokens"],),
                },
            )
            for i in range(number, number + n):
                part = _load(unfinished, i)
                table = np.array([index[unit] for unit in part.units], dtype)
                file.write(table[part.ids].data)
        number += n
    np.save(unfinished / _COUNTS, counts[:, : len(index)])
    with (unfinished / _UNITS).open("w", encoding="ascii") as lines:
        lines.writelines(json.dumps(unit) + "\n" for unit in index)
    return measured


def _load(unfinished: Path, number: int) -> encoding.Part:
    path = encoding.part_path(unfinished, number)
    part = encoding.load_part(path)
    if part is None:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} was damaged and is removed: the same command goes on from there")
    return part


def _seal(path: Path) -> list[Any]:
    """Size, time of the last change, and SHA-256 of a file that is now safely on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        status = os.fstat(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return [status.st_size, status.st_mtime_ns, sha256]


class PreparedText:
    """A `texts.Text` of which no more is in memory than is asked for."""

    def __init__(self, manifest: Manifest, name: str) -> None:
        """Takes a prepared corpus, and which split of it."""
        self._manifest = manifest
        self._name = name
        self._split = manifest.splits[name]

    def _units(self) -> Iterator[str]:
        with (self._manifest.directory / _UNITS).open(encoding="ascii") as lines:
            yield from map(json.loads, lines)

    def _counts(self) -> np.ndarray:
        """How often each unit stands in the split: int64 [units]."""
        row = corpus.SPLITS.index(self._name)
        return np.array(np.load(self._manifest.directory / _COUNTS, mmap_mode="r")[row])

    def vocabulary(self, data: ConfigDict) -> Vocabulary:
        """See `texts.Text`."""
        counts = zip(self._units(), self._counts().tolist(), strict=True)
        return Vocabulary.from_counts(counts, data.units, data.min_count, self._manifest.stop)

    def encode(self, vocabulary: Vocabulary) -> "FileIds":
        """See `texts.Text`."""
        table = vocabulary.look_up(self._units())
        return FileIds(self._manifest.directory / f"{self._name}.npy", table)

    def costs(self, vocabulary: Vocabulary, first: bool = True) -> Costs:
        """See `texts.Text`."""
        ids = vocabulary.look_up(self._units()).tolist()
        unknown = sum(
            count * spelled_bytes(unit)
            for unit, unit_id, count in zip(
                self._units(), ids, self._counts().tolist(), strict=True
            )
            if unit_id == UNKNOWN_ID
        )
        characters = self._split["characters"]
        if not first:
            unit = self._split["first"]
            characters -= len(unit)
            if vocabulary.look_up([unit])[0] == UNKNOWN_ID:
                unknown -= spelled_bytes(unit)
        return Costs(characters, unknown)

    def pieces(self, overlap: int) -> Iterator[str]:
        """See `texts.Text`."""
        manifest = self._manifest
        any_bytes = manifest.units == "bytes"
        names = list(corpus.SPLITS)
        texts = [encoding.segments(p, any_bytes, manifest.ends) for p in manifest.paths()]
        if len(texts) == 1:
            (text,) = texts
            before = sum(
                manifest.splits[name]["bytes"] for name in names[: names.index(self._name)]
            )
            text = encoding.cut(text, before)[1]
            text = encoding.cut(text, self._split["bytes"])[0]
        else:
            text = texts[names.index(self._name)]
        tail = ""
        for chunk, _ in encoding.chunks(text, manifest.units, encoding.CHUNK):
            piece = tail + encoding.decode(chunk, any_bytes, manifest.ends)
            yield piece
            tail = piece[len(piece) - overlap :] if overlap else ""


class FileIds:
    """Ids in a file, read where they are asked for and looked up in a table: `texts.Ids`.

    What was read is not kept, so that memory is constant whatever the size of the file; a mapped
    file's pages would count as the process's own.
    """

    def __init__(self, path: Path, table: np.ndarray) -> None:
        """Takes a file of `.npy`, one axis, and what to make of its numbers: int32 [numbers]."""
        self._file = path.open("rb", buffering=0)
        np.lib.format.read_magic(self._file)
        shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._file)
        self._first = self._file.tell()
        (self._length,) = shape
        self._table = table

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(self._length)
        return self._table.take(self._read(start, max(stop - start, 0)))[::step]

    def cut(self, starts: np.ndarray, length: int) -> np.ndarray:
        """So many ids from each place on: int32 [starts, length]."""
        file, width = self._file.fileno(), self._dtype.itemsize
        size = length * width
        content = b"".join(
            [os.pread(file, size, self._first + start * width) for start in starts.tolist()]
        )
        return self._table.take(np.frombuffer(content, self._dtype)).reshape(len(starts), length)

    def _read(self, start: int, length: int) -> np.ndarray:
        width = self._dtype.itemsize
        content = os.pread(self._file.fileno(), length * width, self._first + start * width)
        return np.frombuffer(content, self._dtype)
