"""Models for tests, with functions that are compiled once for each model and shape.

Without `jax.jit`, JAX compiles every operation of a model; drawing its parameters as a run does
takes another second.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import Run, generation
from lstm_jax import model as model_lib
from lstm_jax.config import Config
from lstm_jax.model import init_params
from lstm_jax.vocabulary import Vocabulary

apply = jax.jit(model_lib.apply, static_argnums=0)


def draw_params(model: model_lib.LanguageModel, scale: float = 0.3) -> model_lib.Params:
    """Return random parameters, biases included, with this standard deviation."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray((scale * draw(size=x.shape)).astype(x.dtype)), shapes)


def make_run(text: str, kind: str = "characters", stop: str = "", **fields: Any) -> Run:
    """Return a model with random parameters, and the vocabulary of a text."""
    vocabulary = Vocabulary.from_text(text + stop + text, kind, stop=stop)
    model = model_lib.LanguageModel(len(vocabulary), 5, 7, stop_id=vocabulary.stop_id, **fields)
    return Run(Config(), vocabulary, model, draw_params(model, 1.0), 0)


def compute_log_probs(model: model_lib.LanguageModel, params: Any, ids: np.ndarray) -> np.ndarray:
    """Return the log-probabilities after each of ids [time]: float64 [time, vocabulary]."""
    padded = np.pad(ids[None], ((0, 0), (0, -len(ids) % 512)))  # What follows has no effect.
    outputs, _ = apply(model, params, padded, model.initial_carry(1))
    logits = np.asarray(outputs[0, : len(ids)], np.float64)
    log_probs: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return log_probs


def predict_text(run: Run, text: str) -> np.ndarray:
    """Return the log-probabilities after each token of a text, as `compute_log_probs` does."""
    return compute_log_probs(run.model, run.params, run.vocabulary.encode(text))


def generate_tokens(model: Any, params: Any, prompts: Any, *more: Any, **options: Any) -> Any:
    """Continue prompts as `generate_chunks` does; return the tokens, int32 [batch, n]."""
    chunks = generation.generate_chunks(model, params, prompts, *more, **options)
    return np.concatenate([*chunks] or [prompts[:, :0]], axis=1)
