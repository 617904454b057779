"""Read the text of a TFDS dataset."""

import contextlib
import os
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from lstm_jax.config import DataConfig
from lstm_jax.data.standard_texts import SPLITS, STANDARD_TEXTS
from lstm_jax.errors import UserError, one_line
from lstm_jax.vocabulary import FILE_END


def read_dataset(data: DataConfig) -> list[bytes]:
    """Return the train, validation and test text of a TFDS dataset, examples joined by line breaks.

    If one of these splits is missing, return only the text of the train split. For
    `data.document_separator=file`, put `FILE_END` after each example instead of line breaks between
    them. Raise `UserError` if there is no such dataset or feature, or preparing it needs
    TensorFlow.
    """
    name, feature = data.dataset, data.text_feature
    data_dir = Path(os.path.expanduser(data.directory or tfds.core.constants.DATA_DIR))
    builder = _prepare(name, data_dir)
    features, splits = builder.info.features, builder.info.splits
    text_features = [key for key in features if isinstance(features[key], tfds.features.Text)]
    if feature not in text_features or "train" not in splits:
        raise UserError(
            f"{name} has no text feature {feature!r} (--config.data.text_feature) in a train "
            f"split; it has {', '.join(text_features) or 'no text'} in {', '.join(splits)}"
        )

    def read_split(split: str) -> bytes:
        source = builder.as_data_source(split=split)
        examples = [source[i][feature] for i in range(len(source))]
        if data.document_separator == "file":
            return b"".join(example + FILE_END.encode() for example in examples)
        return b"\n".join(examples)

    has_all = all(split in splits for split in SPLITS)
    return [read_split(split) for split in (SPLITS if has_all else SPLITS[:1])]


def _prepare(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Open a dataset, and prepare it first if it is not."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            # TFDS prints its progress on standard output, which is for the output of the command.
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"TFDS has no dataset {name!r}, and it is not one of {', '.join(STANDARD_TEXTS)}: "
            "correct --config.data.dataset (a file is --config.data.path)"
        ) from None
    except Exception as error:  # A builder is the dataset's own code: it can raise anything.
        raise UserError(
            f"can't prepare {name} under {data_dir} ({one_line(error)}): prepare it elsewhere, as "
            "array_record, and copy it there, or use another --config.data.directory or "
            "--config.data.dataset"
        ) from None
    return builder
