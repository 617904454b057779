"""Load the splits of a text: read small ones into memory, prepare larger ones on disk."""

import dataclasses
import hashlib
import os
from pathlib import Path

from lstm_jax import user_cache
from lstm_jax.config import DataConfig
from lstm_jax.data import encoding, prepared, sources, standard_texts
from lstm_jax.data.encoding import Text
from lstm_jax.data.prepared import Manifest
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Ids, TextSize, Vocabulary

# The largest text of a run that is read into memory. The config of a run, which may be someone
# else's, can't change it.
_MAX_BYTES_IN_MEMORY = 16 * 10**6


@dataclasses.dataclass
class Splits:
    """The text of each split."""

    texts: dict[str, Text]  # By the name of the split.
    sha256: str  # See `sources.make_checksum`.

    def resolve(self, data: DataConfig) -> DataConfig:
        """Return the fields with the checksum of this text and absolute paths."""
        path = sources.make_absolute(data.path)
        directory = data.prepared and str(Path(os.path.expanduser(data.prepared)).absolute())
        return dataclasses.replace(data, sha256=self.sha256, path=path, prepared=directory)

    def encode(self, vocabulary: Vocabulary) -> tuple[dict[str, Ids], dict[str, TextSize]]:
        """Return the ids of each split; and the sizes of validation and test text.

        These are without the first token, which is never predicted. Raise `UserError` if a split is
        too short.
        """
        ids = {name: text.encode(vocabulary) for name, text in self.texts.items()}
        for name, of_split in ids.items():
            needed = 4 if name == "validation" else 2  # The former is what `zero_state` needs.
            if len(of_split) < needed:
                length = f"{len(of_split)} {vocabulary.token_name}s, and needs {needed}"
                raise UserError(f"the {name} split is too short: it has {length}")
        measured = [(name, text) for name, text in self.texts.items() if name != "train"]
        return ids, {name: text.get_size(vocabulary, first=False) for name, text in measured}


def load_texts(data: DataConfig) -> Splits:
    """Return the splits that the `data` fields of a config describe.

    Files of more than `data.memory_megabytes` together are prepared: encoded once into files, from
    which only the requested ids are read. Everything else is read into memory. Raise `UserError` if
    a text is missing, not UTF-8, empty, too short, or not the one that a run began with.
    """
    data = standard_texts.find_standard_text(data)
    is_large = data.path and sources.measure_files(data.path) > data.memory_megabytes * 10**6
    return _open_splits(data, prepared.prepare_corpus(data) if is_large else None)


def _open_splits(data: DataConfig, manifest: Manifest | None) -> Splits:
    """Return the splits of a prepared corpus, or else read them into memory."""
    if manifest:
        texts, sha256 = prepared.open_splits(manifest), manifest.checksum
    else:
        strings = read_splits(data)
        stop = encoding.find_stop_text(data.document_separator, strings["train"].__contains__)
        texts = {name: Text(text, data.units, stop) for name, text in strings.items()}
        sha256 = compute_checksum(strings)
    sources.check_unchanged(sha256, data.sha256)
    return Splits(texts, sha256)


def load_texts_of_run(
    data: DataConfig, path: str | None, dataset: str | None = None, directory: str | None = None
) -> dict[str, Text]:
    """Return the splits that a run was trained on, for commands that read its text again.

    The run may be someone else's. So the text that its config names is only read, and nothing is
    written outside the user's cache. TFDS imports modules that the files of a dataset name, so only
    datasets that the user has named are opened. A standard text is the same for everybody, so it is
    downloaded and prepared like the user's own.

    Args:
      data: the `data` fields of the run's config.
      path: the current path of its text, or None; this and the next two come from the user.
      dataset: the TFDS dataset with its text.
      directory: TFDS's data directory.

    Raises:
      UserError: as `load_texts` does; or if the user must name the text.
    """
    data = dataclasses.replace(data, directory=directory or "")
    if dataset is not None:
        data = dataclasses.replace(data, path="", dataset=dataset)
    if path is not None:
        data = dataclasses.replace(data, path=path)
    given, data = data, standard_texts.find_standard_text(data)
    may_prepare = path is not None or data is not given
    manifest = None
    if data.path:
        try:
            size = sources.measure_files(data.path)
        except UserError as error:  # Here the path comes from the run, or from a flag.
            raise UserError(f"{error} (--data_path)") from None
        if size > _MAX_BYTES_IN_MEMORY:
            manifest = _find_prepared(data, may_prepare)
    elif data.dataset not in (*standard_texts.STANDARD_TEXTS, dataset):
        raise UserError(
            f"the run was trained on the dataset {data.dataset!r}, which may execute code: if you "
            "trust it, add --dataset NAME, and --data_directory DIR if it is not in TFDS's default "
            "directory"
        )
    splits = _open_splits(data, manifest)
    if given.path and path is None and not given.sha256:  # It could be any file of the user.
        raise UserError(f"the run has no checksum of its text, {given.path}: name it (--data_path)")
    return splits.texts


def _find_prepared(data: DataConfig, may_prepare: bool) -> Manifest:
    """Return the prepared text of a run, from where it was trained or else the user's cache."""
    if manifest := prepared.find_corpus(data):
        return manifest
    data = dataclasses.replace(data, prepared=str(user_cache.get_path("prepared").absolute()))
    if manifest := prepared.prepare_corpus(data) if may_prepare else prepared.find_corpus(data):
        return manifest
    raise UserError(
        f"the text of the run, {data.path}, is larger than {_MAX_BYTES_IN_MEMORY / 1e6:g} MB and "
        f"is not prepared: name it with --data_path FILE to prepare it in {data.prepared}"
    )


def read_splits(data: DataConfig) -> dict[str, str]:
    """Read the text of each split into memory, for the `data` fields of a config."""
    data = standard_texts.find_standard_text(data)
    if data.path:
        split, _ = sources.split_files(sources.find_files(data.path), data)
        texts = [sources.read_segments(segments, data.units == "bytes") for segments in split]
    else:
        from lstm_jax.data import datasets  # Only for a dataset: importing TFDS takes seconds.

        texts = datasets.read_dataset(data)
    splits = dict(zip(sources.SPLITS, texts, strict=True))
    source = data.path or f"the dataset {data.dataset}"
    sources.check_lengths({name: len(text) for name, text in splits.items()}, source)
    return splits


def compute_checksum(splits: dict[str, str]) -> str:
    """Return `data.sha256` of a text; see `sources.make_checksum`."""
    digest, lengths = hashlib.sha256(), []
    for name in sources.SPLITS:
        content = splits[name].encode("utf-8", "surrogateescape")
        digest.update(content)
        lengths.append(len(content))
    return sources.make_checksum(digest, lengths)
