"""Texts of any size, behind one face: in memory, or prepared on the disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from lstm_jax.data import corpus, prepared
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import UNKNOWN_ID, Costs, Vocabulary, count_spelled_bytes, find_stop_text

# A run's text is read into memory again up to so many bytes, whatever the run says.
_LARGEST_IN_MEMORY = 16 * 10**6
# Ids that are counted at a time.
_PIECE = 2**22


class Ids(Protocol):
    """The ids of a text: as of an array int32 [n], its length and its slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Text(Protocol):
    """A text of which some units may be in a vocabulary."""

    def vocabulary(self, data: ConfigDict) -> Vocabulary:
        """The vocabulary of the text, as the `data` fields of a config say."""

    def encode(self, vocabulary: Vocabulary) -> Ids:
        """The ids of the text."""

    def costs(self, vocabulary: Vocabulary, first: bool = True) -> Costs:
        """The costs of the text, with its first unit or without."""

    def pieces(self, overlap: int) -> Iterator[str]:
        """The text in pieces of bounded size, each with the last characters of those before it."""


class TextInMemory:
    """A `Text` that is a `str`."""

    def __init__(self, text: str) -> None:
        """Takes the text."""
        self._text = text

    def vocabulary(self, data: ConfigDict) -> Vocabulary:
        """See `Text`."""
        stop = find_stop_text(data.document_separator, self._text)
        return Vocabulary.from_text(self._text, data.units, data.min_count, stop)

    def encode(self, vocabulary: Vocabulary) -> np.ndarray:
        """See `Text`."""
        return vocabulary.encode(self._text)

    def costs(self, vocabulary: Vocabulary, first: bool = True) -> Costs:
        """See `Text`."""
        ids, units = vocabulary.encode(self._text), vocabulary.split(self._text)
        skipped = 0 if first else 1
        unknown = (
            count_spelled_bytes(unit)
            for unit, unit_id in zip(units[skipped:], ids[skipped:], strict=True)
            if unit_id == UNKNOWN_ID
        )
        return Costs(len(self._text) - sum(map(len, units[:skipped])), sum(unknown))

    def pieces(self, overlap: int) -> Iterator[str]:
        """See `Text`."""
        yield self._text


class Splits(NamedTuple):
    """The text of each split.

    Attributes:
      texts: by the names of the splits.
      sha256: SHA-256 over the bytes of all of them, in hexadecimal.
    """

    texts: dict[str, Text]
    sha256: str

    def settle(self, config: ConfigDict) -> ConfigDict:
        """Return the config with the checksum of this text and absolute paths."""
        config = config.copy_and_resolve_references()
        config.data.sha256 = self.sha256
        if config.data.path:
            config.data.path = corpus.make_absolute(config.data.path)
        if config.data.prepared:
            config.data.prepared = str(Path(config.data.prepared).absolute())
        return config

    def make_vocabulary(self, data: ConfigDict) -> Vocabulary:
        """Return the vocabulary of the training text."""
        return self.texts["train"].vocabulary(data)

    def encode(self, vocabulary: Vocabulary) -> dict[str, Ids]:
        """The ids of each split.

        Raises:
          UserError: if one has no token to read and one to predict.
        """
        ids = {name: text.encode(vocabulary) for name, text in self.texts.items()}
        for name, of_split in ids.items():
            if len(of_split) < 2:
                raise UserError(
                    f"the {name} split is too short: it has {len(of_split)} {vocabulary.kind}"
                )
        return ids


def load_texts(data: ConfigDict) -> Splits:
    """The splits that the `data` fields of a config describe.

    Files of more than `data.memory_megabytes` together are prepared: encoded once into files, of
    which no more is read than is asked for. All else is read into memory.

    Raises:
      UserError: if a text is missing, not UTF-8, empty, or too short to be split; or if it is not
        the one that a run began with.
    """
    large = data.path and prepared.count_bytes(data) > data.memory_megabytes * 10**6
    return _splits(data, prepared.prepare_corpus(data) if large else None)


def _splits(data: ConfigDict, manifest: prepared.Manifest | None) -> Splits:
    """Return the splits of a prepared corpus, or else read them into memory."""
    texts: dict[str, Text]
    if manifest:
        texts = {name: prepared.PreparedText(manifest, name) for name in corpus.SPLITS}
        sha256 = manifest.text_sha256
    else:
        strings = corpus.read_corpus(data)
        texts = {name: TextInMemory(text) for name, text in strings.items()}
        sha256 = corpus.compute_checksum(strings)
    corpus.check_unchanged(sha256, data)
    return Splits(texts, sha256)


def load_texts_of_run(
    data: ConfigDict,
    path: str | None,
    dataset: str | None = None,
    directory: str | None = None,
) -> dict[str, Text]:
    """Return the splits that a run was trained on, for commands that come after it.

    Somebody else may have made the run. So what its config names is read as text only, at no great
    cost, and nothing is written but in the user's cache. TFDS, which imports modules that a
    dataset's files name, reads only what the user has named, and the package's own dataset.

    Args:
      data: the `data` fields of its config.
      path: where its text is now, if the user has named it.
      dataset: the TFDS dataset with its text, if the user has named it.
      directory: TFDS's data directory, if the user has named it, instead of the default.

    Raises:
      UserError: as `load_texts` does; or if the user is to name the text.
    """
    data = data.copy_and_resolve_references()
    if dataset is not None:
        data.path, data.dataset = "", dataset
    if path is not None:
        data.path = path
    data.directory = directory or ""
    if not data.path:
        from lstm_jax.data import tiny_shakespeare  # Only where it is needed, as it imports TFDS.

        if data.dataset not in (tiny_shakespeare.NAME, dataset):
            raise UserError(
                f"the run was trained on the dataset {data.dataset!r}, which may be code: if you "
                "trust it, name it with --dataset NAME, and with --data_directory DIR where it is "
                "if it is not in TFDS's own directory"
            )
        return _splits(data, None).texts
    try:
        size = prepared.count_bytes(data)
    except UserError as error:  # Here the path comes from the run, or from a flag.
        raise UserError(str(error).replace("in data.path", "with --data_path")) from None
    if size <= _LARGEST_IN_MEMORY:
        return _splits(data, None).texts
    found = prepared.find_corpus(data)
    if not found:
        data.prepared = str(prepared.cache_directory())
        found = prepared.prepare_corpus(data) if path is not None else prepared.find_corpus(data)
    if not found:
        raise UserError(
            f"the text of the run, {data.path}, is larger than {_LARGEST_IN_MEMORY / 1e6:g} MB "
            "and was not prepared by you: name it with --data_path FILE, and it is prepared in "
            f"{data.prepared}"
        )
    return _splits(data, found).texts


def count_tokens(ids: Ids, vocabulary_size: int) -> np.ndarray:
    """Return how often each token stands in a text: int64 [vocabulary_size]."""
    counts = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(ids), _PIECE):
        counts += np.bincount(ids[start : start + _PIECE], minlength=vocabulary_size)
    return counts


class Joined:
    """`Ids` of several texts, one after the other."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        """Takes the ids of each."""
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        found = []
        for part in self._parts:
            found.append(part[max(start, 0) : max(stop, 0)])
            start, stop = start - len(part), stop - len(part)
        return np.concatenate(found)
