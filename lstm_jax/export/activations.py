"""Record the activations, gates, predictions and losses of a model while it reads a text."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.cells.base import Gates

# The number of tokens for one compiled call, which bounds the memory for gates.
_CHUNK = 1024

# A gate below `CLOSED` counts as closed, a gate above `OPEN` as open.
CLOSED, OPEN = 0.1, 0.9

# Activations are stored as int8, in steps of 1 / SCALE.
SCALE = 127

GUESSES = 5


class Reading(NamedTuple):
    """A record of a model that read a text of n tokens from start to end."""

    # int8 [hidden units, n], in 1/127: the activation of each hidden unit after each token, as
    # `cells.base.get_activation` defines it; layer by layer.
    activations: np.ndarray
    # For each layer, by the name of the gate, float64 [2, hidden_size]: the share of tokens at
    # which it was below `CLOSED`, and above `OPEN`.
    saturation: list[dict[str, np.ndarray]]
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

    This needs one byte of memory per hidden unit and token, plus about 0.1 GB.
    """
    n, carry = len(ids), model_lib.first_carry(model, params, 1)
    activations = np.empty((sum(model.sizes[1:]), n), np.int8)
    predictions, counts = [], []
    # An extra token makes the last one an input, too. Its loss is dropped below.
    chunks = loss_lib.iterate_chunks(np.append(ids, 0), _CHUNK)
    for start, (inputs, targets, counted) in zip(range(0, n, _CHUNK), chunks, strict=True):
        carry, records, count = _read(model, params, carry, inputs[0], targets[0], counted[0])
        quantized, *predicted = (np.asarray(record)[counted[0]] for record in records)
        activations[:, start : start + _CHUNK] = quantized.T
        predictions.append(predicted)
        counts.append(count)
    guesses, probabilities, bits = map(np.concatenate, zip(*predictions, strict=True))
    bits = np.append(np.float32(0), bits[:-1])
    saturation = jax.tree.map(lambda *numbers: np.sum(numbers, 0, np.float64) / n, *counts)
    return Reading(activations, saturation, guesses, probabilities, bits)


@jax.jit(static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    carry: model_lib.Carry,
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
) -> tuple[model_lib.Carry, tuple[jax.Array, ...], list[Gates]]:
    """Read inputs [time] and predict targets [time]; `counted` [time] is False for padding.

    Return the carry; activations, guesses, probabilities and bits as in `Reading`, but [time, ...],
    with the bits of the target at t; and the number of steps at which each gate was closed, and
    open, [2, hidden_size].
    """
    bound = model.bind({"params": params})

    def step(
        carry: model_lib.Carry, token: jax.Array
    ) -> tuple[model_lib.Carry, tuple[jax.Array, jax.Array, tuple[Gates, ...]]]:
        outputs, carry, records = bound.run_step(token[None], carry)
        gates, activations, _ = zip(*jax.tree.map(lambda x: x[0], records), strict=True)
        return carry, (outputs[0], jnp.concatenate(activations), gates)

    carry, (outputs, activations, gates) = jax.lax.scan(step, carry, inputs)
    logits = bound.predict(outputs[None])[0]
    number = min(GUESSES, model.vocabulary_size)
    probabilities, guesses = jax.lax.top_k(jax.nn.softmax(logits), number)
    bits = optax.softmax_cross_entropy_with_integer_labels(logits, targets) / jnp.log(2.0)
    quantized = jnp.round(SCALE * jnp.clip(activations, -1, 1)).astype(jnp.int8)

    def count(gate: jax.Array) -> jax.Array:
        saturated = (gate < CLOSED, gate > OPEN)
        return jnp.stack([jnp.sum(x, 0, where=counted[:, None]) for x in saturated])

    counts = [
        {name: count(gate) for name, gate in layer.items() if name != "candidate"}
        for layer in gates
    ]
    return carry, (quantized, guesses, probabilities, bits), counts
