"""Predict a text with teachers, whose probabilities a model learns (Hinton et al. 2015)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config
from lstm_jax.errors import UserError, warn
from lstm_jax.run.run import load
from lstm_jax.vocabulary import Ids, Vocabulary


def predict_text(config: Config, vocabulary: Vocabulary, ids: Ids) -> np.ndarray:
    """Return the probabilities of teachers for each token of a text, float16 [n, vocabulary].

    Row i is for ids[i], after the text before it. Row 0, which nothing predicts, is one-hot, so
    that a target that comes after the end of the text has the same loss as without teachers. Warn
    if the teachers of the config were trained on another text. Raise `UserError` if one can't be
    loaded, if they were not all trained on one text, or if their vocabulary is not that of the run.
    """
    names = config.distill.teachers
    teachers = load(names.split(","))
    if teachers.vocabulary.to_fields() != vocabulary.to_fields():
        raise UserError(
            f"the vocabulary of {names}, in config.distill.teachers, is not that of this run: "
            "train all on one text, with the same --config.data.units"
        )
    if teachers.config.data.sha256 != config.data.sha256:
        warn(
            f"{names}, in config.distill.teachers, read another text or other splits: if that has "
            "validation or test text of this run, these losses are too low"
        )
    chunks = loss_lib.iterate_chunks(ids)
    rows = loss_lib.read_chunks(_predict_chunk, teachers.model, teachers.params, chunks)
    return np.concatenate([[np.arange(rows.shape[1]) == ids[0]], rows])


@jax.jit(static_argnames="model")
def _predict_chunk(
    model: Any, params: Any, chunk: loss_lib.Chunk, carry: model_lib.Carry
) -> tuple[jax.Array, model_lib.Carry]:
    """Return the probabilities after each input, float16 [batch, time, vocabulary], and carry."""
    logits, carry = model_lib.apply(model, params, chunk[0], carry)
    return jax.nn.softmax(logits).astype(jnp.float16), carry
