"""Resume rules: which config and vocabulary a run is trained with, and what may have changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.vocabulary import Vocabulary

# The value before and the value now of each field that has changed, by dotted name.
Changes = dict[str, tuple[Any, Any]]


def settle_run(
    config: ConfigDict, directory: Path, make_vocabulary: Callable[[], Vocabulary]
) -> tuple[ConfigDict, Vocabulary, Changes]:
    """Return config and vocabulary, new or of the run in `directory`, and the config's changes.

    Args:
      config: a complete config, with the checksum of the text.
      directory: the working directory.
      make_vocabulary: returns the vocabulary of the training text, for a new run.

    Raises:
      UserError: if the run has another text, or another config in a field that can't change.
    """
    config = config.copy_and_resolve_references()
    if config.init_from:
        config.init_from = str(Path(config.init_from).absolute())
    workdir.check_own_files(directory)
    if (directory / workdir.CONFIG).exists():
        before = workdir.load_config(directory)
        config.init_from = config.init_from or before.init_from
        changes = _compare(before, config, directory)
        return config, workdir.load_vocabulary(directory), changes
    for name in (workdir.CHECKPOINTS, workdir.METRICS):
        if (directory / name).exists():
            raise UserError(
                f"{directory} holds {name} but no {workdir.CONFIG}: restore that file, or start a "
                "new run with another --workdir"
            )
    vocabulary = make_vocabulary()
    if config.init_from:
        source = Path(config.init_from)
        _compare(workdir.load_config(source), config, source, only="model.")
        vocabulary = workdir.load_vocabulary(source).extended(vocabulary)
    return config, vocabulary, {}


def save_settled(
    directory: Path, config: ConfigDict, vocabulary: Vocabulary, step: int, changes: Changes
) -> None:
    """Write config and vocabulary, and append the changes after `step` to changes.jsonl."""
    if changes:
        workdir.append_changes(directory, step, changes)
    workdir.save_vocabulary(directory, vocabulary)
    workdir.save_config(directory, config)


def _compare(before: ConfigDict, config: ConfigDict, directory: Path, only: str = "") -> Changes:
    """Return the changed fields that start with `only`; raise `UserError` if one can't change."""
    old = dict(config_lib.flatten(before))
    changes = {
        field: (old[field], value)
        for field, value in config_lib.flatten(config)
        if field.startswith(only) and value != old[field]
    }
    fixed = {f: values for f, values in changes.items() if f not in config_lib.CHANGEABLE}
    if "data.sha256" in fixed:
        text = before.data.path or f"the dataset {before.data.dataset}"
        raise UserError(
            f"{directory} holds a run that was trained on another text ({text}): bring that back, "
            "or name another --workdir"
        )
    if fixed and only:
        own = " ".join(f"--config.{field}={was!r}" for field, (was, _) in fixed.items())
        raise UserError(f"the model in {directory} has other sizes: add {own}")
    if fixed:
        listed = "; ".join(f"{f} was {was!r} and is {now!r}" for f, (was, now) in fixed.items())
        raise UserError(
            f"{directory} holds a run with another config ({listed}): continue with its own, or "
            "name another --workdir"
        )
    return changes
