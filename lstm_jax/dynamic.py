"""Dynamic evaluation: the model adapts to a text while it reads it (Krause et al. 2018).

The text is read in segments. Each is predicted first, with what was learnt from the segments before
it, and then learnt from: a step against the gradient of its loss, and a step back towards the
trained parameters. No prediction ever depends on its own token or a later one.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import model as model_lib
from lstm_jax import texts

# Segments read by one call of the compiled function.
_SEGMENTS = 32


class Settings(NamedTuple):
    """How the model adapts.

    With the defaults, `python -m lstm_jax.evaluate --workdir runs/quick --dynamic` measures 1.424
    nats per character, and without --dynamic 1.553. They were not tuned further.

    Attributes:
      learning_rate: of a step on one segment.
      decay: the share of the distance to the trained parameters that each step takes back.
      segment_length: tokens that are predicted before the next step.
      max_gradient_norm: gradients are scaled down to this global norm.
    """

    learning_rate: float = 0.6
    decay: float = 0.002
    segment_length: int = 50
    max_gradient_norm: float = 0.5


def mean_loss(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    ids: texts.Ids,
    settings: Settings,
) -> float:
    """The mean of `losses`, of which not all are in memory at a time."""
    read = losses(model, params, ids, settings)
    return sum(float(part.sum(dtype=np.float64)) for part in read) / (len(ids) - 1)


def losses(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    ids: texts.Ids,
    settings: Settings,
) -> Iterator[np.ndarray]:
    """The loss of each token but the first, in nats: float32 arrays, n - 1 losses in all.

    The carry is handed on from the text's start to its end.

    Args:
      model: the model.
      params: its trained parameters.
      ids: the text, int32 [n], n at least 2.
      settings: how it adapts.
    """
    state = (params, model.initial_carry(1))
    tokens = _SEGMENTS * settings.segment_length
    for start in range(0, len(ids) - 1, tokens):
        # The last segments are filled up, uncounted, so that one compiled function serves all.
        window = np.asarray(ids[start : start + tokens + 1])
        missing = tokens + 1 - len(window)
        state, more = _read(
            model,
            params,
            state,
            np.pad(window[:-1], (0, missing)).reshape(_SEGMENTS, -1),
            np.pad(window[1:], (0, missing)).reshape(_SEGMENTS, -1),
            (np.arange(tokens) < tokens - missing).reshape(_SEGMENTS, -1),
            settings,
        )
        yield np.asarray(more)[: tokens - missing]


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    trained: model_lib.Params,
    state: tuple[model_lib.Params, model_lib.Carry],
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    settings: Settings,
) -> tuple[tuple[model_lib.Params, model_lib.Carry], jax.Array]:
    """Reads segments [number, time]: the adapted parameters with the carry, and losses, flat."""

    def mean_loss(params: model_lib.Params, carry: model_lib.Carry, segment: Any) -> Any:
        inputs, targets, counted = segment
        logits, carry = model_lib.apply(model, params, inputs[None], carry)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[0], targets)
        return jnp.mean(losses, where=counted | ~counted.any()), (losses, carry)

    def step(state: Any, segment: Any) -> Any:
        params, carry = state
        gradient, (losses, carry) = jax.grad(mean_loss, has_aux=True)(params, carry, segment)
        norm = optax.tree.norm(gradient)
        rate = settings.learning_rate * jnp.minimum(1, settings.max_gradient_norm / norm)
        params = jax.tree.map(
            lambda p, g, p0: p - rate * g + settings.decay * (p0 - p), params, gradient, trained
        )
        return (params, carry), losses

    state, losses = jax.lax.scan(step, state, (inputs, targets, counted))
    return state, losses.reshape(-1)
