"""Load a text, measure the loss of a model or an ensemble on it, and report the loss."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lstm_jax import dynamic
from lstm_jax import loss as loss_lib
from lstm_jax.data import texts
from lstm_jax.data.texts import Text
from lstm_jax.ensemble import list_members
from lstm_jax.errors import UserError
from lstm_jax.run.library import Run
from lstm_jax.vocabulary import UNKNOWN_ID, Ids, TextSize, Vocabulary


class Subject(NamedTuple):
    """A text to measure."""

    fields: dict[str, object]  # What it is, as fields of JSON.
    ids: Ids
    sizes: list[TextSize]  # Of its parts, without the first token, which nothing predicts.


def load_file(path: str, vocabulary: Vocabulary) -> Subject:
    """Read a file, or standard input for "-", as a run with this vocabulary reads its own text.

    Raise `UserError` if it can't be read or is too short.
    """
    name = "standard input" if path == "-" else path
    text = texts.read_argument(path, "--text", vocabulary.kind, vocabulary.stop)
    subject = _encode({"text": name}, [text], vocabulary)
    subject.fields["unknown_tokens"] = int((subject.ids == UNKNOWN_ID).sum())
    return subject


def join_splits(name: str, splits: Mapping[str, Text], vocabulary: Vocabulary) -> Subject:
    """Return one or several splits as one text; `name` joins their names by +."""
    return _encode({"split": name}, [splits[split] for split in name.split("+")], vocabulary)


def _encode(fields: dict[str, object], parts: Sequence[Text], vocabulary: Vocabulary) -> Subject:
    """Encode the parts of a text; raise `UserError` if it has fewer than two tokens."""
    encoded = [part.encode(vocabulary) for part in parts]
    ids = encoded[0] if len(parts) == 1 else np.concatenate(encoded)
    if len(ids) < 2:
        (name,) = fields.values()
        length = f"{len(ids)} {vocabulary.token_name}s, and 2 are needed"
        raise UserError(f"{name} is too short: it has {length}")
    sizes = [
        part.measure(vocabulary, of_part, first=i > 0)
        for i, (part, of_part) in enumerate(zip(parts, encoded, strict=True))
    ]
    return Subject(fields, ids, sizes)


def measure_in_windows(trained: Run, ids: Ids, context: int) -> float:
    """Return the mean loss in nats per token, in windows that are read from a zero state."""
    losses = loss_lib.compute_token_losses(trained.model, trained.params, ids, context)
    return float(losses.mean(dtype=np.float64))


def measure_dynamic_loss(
    trained: Run, ids: Ids, train_ids: Ids, settings: dynamic.Settings
) -> float:
    """Return the mean loss in nats per token with dynamic evaluation."""
    members = list_members(trained.model, trained.params)
    parts = dynamic.adapt_to_text(members, train_ids, ids, settings)
    return sum(float(part.sum(dtype=np.float64)) for part in parts) / (len(ids) - 1)


def report_loss(subject: Subject, loss: float) -> dict[str, object]:
    """Return the loss in several units, as fields of JSON, which has no infinity."""
    perplexity = loss_lib.compute_perplexity(loss)
    return {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": loss_lib.compute_bits_per_character(loss, subject.sizes),
        "perplexity": None if perplexity == math.inf else perplexity,
        "tokens": len(subject.ids) - 1,
    }
