"""Read the text of a TFDS dataset."""

import contextlib
import os
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from lstm_jax.config import DataConfig
from lstm_jax.data.sources import SPLITS, Segment
from lstm_jax.data.standard_texts import STANDARD_TEXTS
from lstm_jax.errors import UserError, one_line
from lstm_jax.vocabulary import FILE_END


def read_dataset(data: DataConfig) -> list[list[Segment]]:
    """Return the train, validation and test text of a TFDS dataset, examples joined by line breaks.

    If one of these splits is missing, return only the text of the train split. For
    `data.document_separator=file`, put `FILE_END` after each example instead of line breaks between
    them. Raise `UserError` if there is no such dataset or feature, or preparing it needs
    TensorFlow.
    """
    name, feature = data.dataset, data.text_feature
    data_dir = Path(os.path.expanduser(data.directory or tfds.core.constants.DATA_DIR))
    builder = _prepare(name, data_dir)
    features = builder.info.features
    known = [key for key in features if isinstance(features[key], tfds.features.Text)]
    if feature not in known:
        raise UserError(
            f"{name} has no text feature {feature!r} (data.text_feature); it has "
            f"{', '.join(known) or 'none'}"
        )
    if "train" not in builder.info.splits:
        raise UserError(f"{name} has no train split: choose another data.dataset")

    def read_split(split: str) -> list[Segment]:
        source = builder.as_data_source(split=split)
        examples = [source[i][feature] for i in range(len(source))]
        if data.document_separator == "file":
            content = b"".join(example + FILE_END.encode() for example in examples)
        else:
            content = b"\n".join(examples)
        return [Segment(content, 0, len(content))]

    has_all = all(split in builder.info.splits for split in SPLITS)
    return [read_split(split) for split in (SPLITS if has_all else SPLITS[:1])]


def _prepare(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Open a dataset, and prepare it first if it is not."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"TFDS has no dataset {name!r}, and it is not one of {', '.join(STANDARD_TEXTS)}: "
            "correct data.dataset"
        ) from None
    except Exception as error:  # TFDS raises many types, for bad names and damaged files.
        if "File format is already set" not in str(error):
            reason = one_line(error)
            raise UserError(f"can't open the dataset {name!r} (data.dataset): {reason}") from None
        raise UserError(
            f"{name} is prepared under {data_dir} in a format that only TensorFlow reads: use "
            "another data.directory (or --data_directory), where it is prepared anew"
        ) from None
    if not builder.is_prepared():
        try:
            # TFDS prints its progress on standard output, which is for the output of the command.
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare()
        except ImportError as error:  # TFDS raises its own error for modules that it imports late.
            missing = error.name or getattr(error.__cause__, "name", None) or one_line(error)
            raise UserError(
                f"preparing {name} needs {missing}, which is not installed: prepare it as "
                f"array_record elsewhere and copy it to {data_dir}"
            ) from None
        except Exception as error:  # A builder is the dataset's own code: it can raise anything.
            reason = one_line(error)
            raise UserError(f"can't prepare {name} under {data_dir}: {reason}") from None
    return builder
