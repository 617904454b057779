"""Record the activations, predictions and losses of a model while it reads a text."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib

# The number of tokens for one compiled call.
_CHUNK = 1024

# Activations are stored as int8, in steps of 1 / SCALE.
SCALE = 127

GUESSES = 5


class Reading(NamedTuple):
    """A record of a model that read a text of n tokens from start to end."""

    # int8 [n, hidden units], in 1/127: the activation of each hidden unit after each token, as
    # `cells.base.get_activation` defines it; layer by layer.
    activations: np.ndarray
    # int32 [n, at most `GUESSES`]: the most probable tokens after each token, the first of which is
    # the most probable: guesses[t] predict token t + 1.
    guesses: np.ndarray
    probabilities: np.ndarray  # Their probabilities, float32 of the same shape.
    # float32 [n]: bits[t] is the loss of token t itself, given all before it; 0 for the first.
    bits: np.ndarray


def record_activations(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: np.ndarray
) -> Reading:
    """Read a text, int32 [n], with one carry from start to end, and record the model.

    This needs three bytes of memory per hidden unit and token.
    """
    # An extra token makes the last one an input, too. Its loss is dropped below.
    chunks = loss_lib.iterate_chunks(np.append(ids, 0), _CHUNK)
    reading = Reading(*loss_lib.read_chunks(_read, model, params, chunks))
    return reading._replace(bits=np.append(np.float32(0), reading.bits[:-1]))


@jax.jit(static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    chunk: loss_lib.Chunk,
    carry: model_lib.Carry,
) -> tuple[tuple[jax.Array, ...], model_lib.Carry]:
    """Read a chunk; return the carry, and before it the arrays of a `Reading`, [1, time, ...].

    At t, the bits are those of the target.
    """
    inputs, targets, _ = chunk
    bound = model.bind({"params": params})

    def step(
        carry: model_lib.Carry, ids: jax.Array
    ) -> tuple[model_lib.Carry, tuple[jax.Array, jax.Array]]:
        outputs, carry, records = bound.run_step(ids, carry)
        return carry, (outputs, jnp.concatenate([activation for activation, _ in records], axis=1))

    carry, steps = jax.lax.scan(step, carry, inputs.T)
    outputs, activations = (x.swapaxes(0, 1) for x in steps)
    logits = bound.predict(outputs)
    number = min(GUESSES, model.vocabulary_size)
    probabilities, guesses = jax.lax.top_k(jax.nn.softmax(logits), number)
    bits = optax.softmax_cross_entropy_with_integer_labels(logits, targets) / jnp.log(2.0)
    quantized = jnp.round(SCALE * jnp.clip(activations, -1, 1)).astype(jnp.int8)
    return (quantized, guesses, probabilities, bits), carry
