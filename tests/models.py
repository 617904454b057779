"""Models for tests, with functions that are compiled once for each model and shape.

Without `jax.jit`, JAX compiles every operation of a model; drawing its parameters as a run does
takes another second.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import model as model_lib
from lstm_jax.model import init_params

apply = jax.jit(model_lib.apply, static_argnums=0)


def draw_params(model: model_lib.LanguageModel, scale: float = 0.3) -> model_lib.Params:
    """Return random parameters, biases included, with this standard deviation."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray((scale * draw(size=x.shape)).astype(x.dtype)), shapes)
