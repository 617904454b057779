"""Models for tests, with functions that are compiled once for each model and shape.

Without `jax.jit`, JAX compiles every operation of a model; drawing its parameters as a run does
takes another second.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import generation
from lstm_jax import model as model_lib
from lstm_jax.model import init_params

apply = jax.jit(model_lib.apply, static_argnums=0)


def draw_params(model: model_lib.LanguageModel, scale: float = 0.3) -> model_lib.Params:
    """Return random parameters, biases included, with this standard deviation."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray((scale * draw(size=x.shape)).astype(x.dtype)), shapes)


def generate_tokens(model: Any, params: Any, prompts: Any, *more: Any, **options: Any) -> Any:
    """Continue prompts as `generate_chunks` does; return the tokens, int32 [batch, n]."""
    chunks = generation.generate_chunks(model, params, prompts, *more, **options)
    return np.concatenate([*chunks] or [prompts[:, :0]], axis=1)
