"""What goes on inside a model while it reads a text: cells, gates, guesses, surprise."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import model as model_lib

# Tokens read by one call of the compiled function, which bounds the memory that gates take.
_CHUNK = 1024

# A gate beyond these is shut, or open.
SHUT, OPEN = 0.1, 0.9

# Activations are kept as int8: this stands for 1.
SCALE = 127

GUESSES = 5


class Reading(NamedTuple):
    """What was seen while a text of n tokens was read from its start to its end.

    Attributes:
      activations: int8 [cells, n], in 1/127: what each cell holds after each token, as
        `activation` of its class gives it. Those of the first layer come first.
      saturation: of each layer by gate, float64 [2, hidden_size]: the share of tokens at which the
        gate was below `SHUT`, and above `OPEN`.
      guesses: int32 [n, at most `GUESSES`]: the likeliest tokens to follow each, likeliest first.
      probabilities: theirs, float32 of the same shape.
      bits: float32 [n], what each token cost, predicted from all before it; 0 for the first.
    """

    activations: np.ndarray
    saturation: list[dict[str, np.ndarray]]
    guesses: np.ndarray
    probabilities: np.ndarray
    bits: np.ndarray


def record_activations(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: np.ndarray
) -> Reading:
    """Reads a text once, the carry handed on all the way, and keeps what `Reading` holds.

    Memory: a byte for each cell and token, and 0.1 GB or so.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, int32 [n], n at least 2.
    """
    n = len(ids)
    activations = np.empty((sum(model.sizes[1:]), n), np.int8)
    guesses = np.empty((n, min(GUESSES, model.vocabulary_size)), np.int32)
    probabilities = np.empty(guesses.shape, np.float32)
    bits = np.zeros(n + 1, np.float32)
    saturated: Any = 0
    following = np.append(ids[1:], 0)
    carry = model.initial_carry(1)
    for start in range(0, n, _CHUNK):
        # The last chunk is filled up, uncounted, so that one compiled function serves all.
        chunk = slice(start, min(start + _CHUNK, n))
        length = chunk.stop - start
        fill = (0, _CHUNK - length)
        inputs, targets = np.pad(ids[chunk], fill), np.pad(following[chunk], fill)
        carry, seen, counts = _read(model, params, carry, inputs, targets, length)
        parts = [np.asarray(part)[:length] for part in seen]
        activations[:, chunk] = parts[0].T
        guesses[chunk], probabilities[chunk], bits[start + 1 : chunk.stop + 1] = parts[1:]
        counts = jax.tree.map(lambda count: np.asarray(count, np.float64), counts)
        saturated = jax.tree.map(np.add, saturated, counts) if start else counts
    shares = jax.tree.map(lambda count: count / n, saturated)
    return Reading(activations, shares, guesses, probabilities, bits[:n])


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    carry: model_lib.Carry,
    inputs: jax.Array,
    targets: jax.Array,
    length: jax.Array,
) -> tuple[model_lib.Carry, tuple[jax.Array, ...], list[dict[str, jax.Array]]]:
    """Reads inputs [time], of which `length` count, and predicts targets [time].

    Returns:
      The carry; activations, guesses, probabilities and bits of the targets as in `Reading`, but
      with time in front; and how many times each gate was shut and open, [2, hidden_size].
    """

    def step(carry: model_lib.Carry, token: jax.Array) -> tuple[model_lib.Carry, Any]:
        bound = model.bind({"params": params})
        outputs, last, activations, gates = bound.embedding.embedding[token][None], [], [], []
        for cell, before in zip(bound.layers, carry, strict=True):
            gates.append({name: gate[0] for name, gate in cell.gates(before, outputs).items()})
            layer_carry, outputs = cell(before, outputs)
            activations.append(cell.activation(layer_carry)[0])
            last.append(layer_carry)
        return tuple(last), (outputs[0], jnp.concatenate(activations), gates)

    carry, (outputs, activations, gates) = jax.lax.scan(step, carry, inputs)
    logits: Any = model.apply({"params": params}, outputs[None], method="predict")
    probabilities, guesses = jax.lax.top_k(
        jax.nn.softmax(logits[0]), min(GUESSES, model.vocabulary_size)
    )
    bits = optax.softmax_cross_entropy_with_integer_labels(logits[0], targets) / jnp.log(2.0)
    quantised = jnp.round(SCALE * activations).astype(jnp.int8)
    counted = (jnp.arange(len(inputs)) < length)[:, None]

    def count(gate: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(x, 0, where=counted) for x in (gate < SHUT, gate > OPEN)])

    counts = [
        {name: count(gate) for name, gate in layer.items() if name != "candidate"}
        for layer in gates
    ]
    return carry, (quantised, guesses, probabilities, bits), counts
