"""TFDS's datasets of text, as three splits."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from lstm_jax.data import corpus, tiny_shakespeare
from lstm_jax.errors import UserError, one_line

# Its bars are for downloads of gigabytes; here they would bury what a command prints.
tfds.disable_progress_bar()


def read_dataset(
    name: str,
    text_feature: str,
    directory: str,
    fractions: Sequence[float],
    any_bytes: bool = False,
    ends: bool = False,
) -> dict[str, str]:
    """The splits of a TFDS dataset, its examples joined by line breaks.

    A dataset that has no validation or test split of its own gets all three cut, by `fractions`,
    from the examples of its train split.

    Args:
      name: as TFDS knows it: "tiny_shakespeare", "wiki40b/en:1.3.0".
      text_feature: the feature that holds text.
      directory: TFDS's data directory; "" for its default.
      fractions: the shares of train, validation and test.
      any_bytes: whether bytes that are no UTF-8 are kept, as surrogates.
      ends: whether `FILE_END` stands after each example, instead of line breaks between them.

    Raises:
      UserError: if there is no such dataset or feature, or it can't be prepared without TensorFlow.
    """
    data_dir = Path(os.path.expanduser(directory or tfds.core.constants.DATA_DIR))
    builder = _open_builder(name, data_dir)
    if not builder.is_prepared():
        try:
            # TFDS tells its progress on standard output, which is for what a command was asked.
            with contextlib.redirect_stdout(sys.stderr):
                if name.partition(":")[0] == tiny_shakespeare.NAME:
                    tiny_shakespeare.prepare_dataset(data_dir)
                else:
                    builder.download_and_prepare()
        except ImportError as error:
            raise UserError(
                f"preparing {name} needs {error.name}, which is not here: prepare it as "
                f"array_record elsewhere and copy it to {data_dir}"
            ) from None
        except UserError:
            raise
        except Exception as error:  # A builder is code of the dataset's own: it can raise anything.
            reason = one_line(error)
            raise UserError(f"can't prepare {name} under {data_dir}: {reason}") from None
        builder = _open_builder(name, data_dir)
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    if text_feature not in texts:
        known = ", ".join(texts) or "none"
        raise UserError(f"{name} has no text {text_feature!r} (data.text_feature); it has {known}")
    if "train" not in builder.info.splits:
        raise UserError(f"{name} has no split named train to learn from")

    def text(split_name: str) -> str:
        try:
            source = builder.as_data_source(split=split_name)
            examples = [source[i][text_feature] for i in range(len(source))]
        except Exception as error:  # It is damaged, or the code of one of its features fails.
            reason = one_line(error)
            raise UserError(f"can't read {name} under {data_dir}: {reason}") from None
        texts = [
            corpus.decode_text(example, f"example {i} of {name}", any_bytes)
            for i, example in enumerate(examples)
        ]
        return corpus.join_with_ends(texts) if ends else "\n".join(texts)

    if all(name in builder.info.splits for name in corpus.SPLITS):
        return {name: text(name) for name in corpus.SPLITS}
    return corpus.split_by_position(text("train"), fractions)


def _open_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"TFDS knows no dataset {name!r}: correct data.dataset") from None
    except Exception as error:  # TFDS raises many, for names that are none and damaged files.
        if "File format is already set" not in str(error):
            reason = one_line(error)
            raise UserError(f"can't open the dataset {name!r} (data.dataset): {reason}") from None
        raise UserError(
            f"{name} is prepared under {data_dir} in a format that only TensorFlow reads: name "
            "another data.directory, and it is prepared there as array_record"
        ) from None
