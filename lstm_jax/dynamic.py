"""Dynamic evaluation: train the model on a text while measuring its loss (Krause et al. 2018).

The text is read in segments. The model first predicts a segment, and then takes a gradient step on
its loss and a step back towards the trained parameters. So no prediction depends on the token
that it predicts, or on a later one.

The update is the one that the paper calls RMS with an RMS global prior. With s the root mean square
of a parameter's gradient over segments of the training text, and m the mean of s over all
parameters,

    p <- p - learning_rate * gradient / (s + epsilon * m) + min(decay * s / m, 1) * (trained - p)

so that, with a small epsilon, parameters with small gradients in training move as readily as the
others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax.ensemble import mix_losses
from lstm_jax.loss import Chunk, iterate_chunks
from lstm_jax.model import Carry, LanguageModel, Params, first_carry
from lstm_jax.vocabulary import Ids

_SEGMENTS = 32  # Segments read by one call of the compiled function.
# Tokens of the training text that gradients are measured on: the length of Tiny Shakespeare's
# validation split, so that measuring takes no longer than evaluating.
_STATISTICS_TOKENS = 60_000


class Settings(NamedTuple):
    """Settings of dynamic evaluation."""

    learning_rate: float
    # The fraction of the distance to the trained parameters that each step removes, for a parameter
    # with a gradient of mean size.
    decay: float
    segment_length: int  # Tokens predicted between two gradient steps.
    epsilon: float = 0.1  # Limits the steps of parameters with small gradients in training.


def adapt_to_text(
    members: Sequence[tuple[LanguageModel, Params]], train_ids: Ids, ids: Ids, settings: Settings
) -> np.ndarray:
    """Compute the losses of `compute_dynamic_losses` for an ensemble of models, of one or more.

    Each model adapts independently, with the gradients of its own loss.
    """
    losses = []
    for model, params in members:
        sizes = measure_gradient_sizes(model, params, train_ids, settings.segment_length)
        losses.append(compute_dynamic_losses(model, params, ids, settings, sizes))
    return np.asarray(mix_losses(losses))


def measure_gradient_sizes(
    model: LanguageModel, params: Params, ids: Ids, segment_length: int
) -> Params:
    """Compute the root mean square of each parameter's gradient over segments of the training text.

    The carry is kept between segments. The text has at least two tokens, of which at most 60,000
    are read. The result has the shapes of `params`.
    """
    window = np.asarray(ids[: _STATISTICS_TOKENS + 1], np.int32)
    length = min(segment_length, len(window) - 1)
    end = (len(window) - 1) // length * length
    inputs, targets = window[:end].reshape(-1, length), window[1 : end + 1].reshape(-1, length)
    return _measure_gradient_sizes(model, params, inputs, targets)


@jax.jit(static_argnames="model")
def _measure_gradient_sizes(
    model: LanguageModel, params: Params, inputs: jax.Array, targets: jax.Array
) -> Params:
    def add_squares(
        state: tuple[Params, Carry], segment: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Params, Carry], None]:
        sums, carry = state
        grads, (_, carry) = _compute_grads(model, params, carry, (*segment, True))
        return (jax.tree.map(lambda s, g: s + g**2, sums, grads), carry), None

    start = jax.tree.map(jnp.zeros_like, params), model.initial_carry(1)
    (sums, _), _ = jax.lax.scan(add_squares, start, (inputs, targets))
    return jax.tree.map(lambda s: jnp.sqrt(s / len(inputs)), sums)


def compute_dynamic_losses(
    model: LanguageModel, params: Params, ids: Ids, settings: Settings, sizes: Params
) -> np.ndarray:
    """Compute the loss of each token but the first, in nats: float32 [n - 1] for n ids.

    The carry is kept throughout. `sizes` come from `measure_gradient_sizes`.
    """
    state, losses = (params, first_carry(model, params, 1)), []
    length = min(settings.segment_length, len(ids) - 1)
    number = min(_SEGMENTS, -(-(len(ids) - 1) // length))
    for chunk in iterate_chunks(ids, number * length):
        segments = jax.tree.map(lambda array: array.reshape(number, -1), chunk)
        state, of_chunk = _read_segments(model, params, sizes, state, segments, settings)
        losses.append(np.asarray(of_chunk)[segments[2]])
    return np.concatenate(losses)


@jax.jit(static_argnames="model")
def _read_segments(
    model: LanguageModel,
    initial_params: Params,
    sizes: Params,
    state: tuple[Params, Carry],
    segments: Chunk,
    settings: Settings,
) -> tuple[tuple[Params, Carry], jax.Array]:
    """Read segments [number, time]; return the adapted parameters, the carry, and the losses."""
    leaves = jax.tree.leaves(sizes)
    mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)

    def adapt(p: jax.Array, g: jax.Array, p0: jax.Array, size: jax.Array) -> jax.Array:
        back = jnp.minimum(settings.decay * size / mean, 1)
        return p - settings.learning_rate * g / (size + settings.epsilon * mean) + back * (p0 - p)

    def step(state: tuple[Params, Carry], segment: Chunk) -> tuple[tuple[Params, Carry], jax.Array]:
        (params, carry), (inputs, targets, counted) = state, segment
        # Else the mean over a segment that is all padding, after the last token, would be NaN.
        counted = counted | ~counted.any()
        grads, (losses, carry) = _compute_grads(model, params, carry, (inputs, targets, counted))
        return (jax.tree.map(adapt, params, grads, initial_params, sizes), carry), losses

    return jax.lax.scan(step, state, segments)


def _compute_grads(
    model: LanguageModel, params: Params, carry: Carry, segment: Chunk
) -> tuple[Params, tuple[jax.Array, Carry]]:
    """Differentiate the mean loss of a segment; also return its losses [time] and the carry."""
    inputs, targets, counted = segment

    def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, Carry]]:
        losses, new_carry = model.measure(params, inputs[None], targets[None], carry)
        return jnp.mean(losses[0], where=counted), (losses[0], new_carry)

    return jax.grad(loss_fn, has_aux=True)(params)
