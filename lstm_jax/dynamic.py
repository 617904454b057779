"""Dynamic evaluation: the model adapts to a text while it reads it (Krause et al. 2018).

The text is read in segments. Each is predicted first, with what was learnt from the segments before
it, and then learnt from: a step against the gradient of its loss, and a step back towards the
trained parameters. No prediction ever depends on its own token or a later one.

This is the rule that the paper calls RMS with an RMS global prior. With s the root mean square of a
parameter's gradient over segments of the training text, and m the mean of s over all parameters,

    p <- p - learning_rate * gradient / (s + 0.1 m) + min(decay * s / m, 1) * (trained - p)

so that parameters which mattered little in training move as readily as the others.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import model as model_lib
from lstm_jax.vocabulary import Ids

# Segments read by one call of the compiled function.
_SEGMENTS = 32

# Tokens of the training text that gradients are measured on: about as many as Tiny Shakespeare's
# validation split has, so that it takes no longer than the evaluation.
STATISTICS_TOKENS = 60_000

# Added to the size of every gradient, as a share of the mean size: no step is boundless.
_FLOOR = 0.1


class Settings(NamedTuple):
    """How the model adapts.

    The defaults are the best of a dozen settings on the validation split of experiments/quick.py:
    `python -m lstm_jax.evaluate --workdir runs/quick --split validation --dynamic` gives 1.359 nats
    per character, and without --dynamic 1.443.

    Attributes:
      learning_rate: of a step on one segment.
      decay: the share of the distance to the trained parameters that each step takes back, for a
        parameter with a gradient of mean size.
      segment_length: tokens that are predicted before the next step.
    """

    learning_rate: float = 6e-4
    decay: float = 0.003
    segment_length: int = 50


def measure_gradient_sizes(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: Ids, segment_length: int
) -> model_lib.Params:
    """The root mean square of each parameter's gradient over segments of a text, shaped as params.

    The carry is handed on from one segment to the next. At most `STATISTICS_TOKENS` are read.

    Args:
      model: the model.
      params: its trained parameters.
      ids: the text it was trained on, int32 [n], n at least 2.
      segment_length: tokens of a segment.
    """
    read = np.asarray(ids[: STATISTICS_TOKENS + 1])
    length = min(segment_length, len(read) - 1)
    end = (len(read) - 1) // length * length
    inputs, targets = read[:end].reshape(-1, length), read[1 : end + 1].reshape(-1, length)
    return _gradient_sizes(model, params, inputs, targets)


@functools.partial(jax.jit, static_argnames="model")
def _gradient_sizes(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    inputs: jax.Array,
    targets: jax.Array,
) -> model_lib.Params:
    def add(state: Any, segment: Any) -> Any:
        sums, carry = state
        inputs, targets = segment
        gradient, (_, carry) = _gradient(model, params, carry, inputs, targets, True)
        return (jax.tree.map(lambda s, g: s + g**2, sums, gradient), carry), None

    start = jax.tree.map(jnp.zeros_like, params), model.initial_carry(1)
    (sums, _), _ = jax.lax.scan(add, start, (inputs, targets))
    return jax.tree.map(lambda s: jnp.sqrt(s / len(inputs)), sums)


def compute_dynamic_loss(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    ids: Ids,
    settings: Settings,
    sizes: model_lib.Params,
) -> float:
    """The mean of `compute_dynamic_losses`, of which not all are in memory at a time."""
    read = compute_dynamic_losses(model, params, ids, settings, sizes)
    return sum(float(part.sum(dtype=np.float64)) for part in read) / (len(ids) - 1)


def compute_dynamic_losses(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    ids: Ids,
    settings: Settings,
    sizes: model_lib.Params,
) -> Iterator[np.ndarray]:
    """The loss of each token but the first, in nats: float32 arrays, n - 1 losses in all.

    The carry is handed on from the text's start to its end.

    Args:
      model: the model.
      params: its trained parameters.
      ids: the text, int32 [n], n at least 2.
      settings: how it adapts.
      sizes: from `measure_gradient_sizes`, of the training text.
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
            sizes,
            state,
            np.pad(window[:-1], (0, missing)).reshape(_SEGMENTS, -1),
            np.pad(window[1:], (0, missing)).reshape(_SEGMENTS, -1),
            (np.arange(tokens) < tokens - missing).reshape(_SEGMENTS, -1),
            settings,
        )
        yield np.asarray(more)[: tokens - missing]


def _gradient(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    carry: model_lib.Carry,
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array | bool,
) -> tuple[model_lib.Params, tuple[jax.Array, model_lib.Carry]]:
    """The gradient of a segment's mean loss; its losses [time], and the carry after it."""

    def mean_loss(params: model_lib.Params) -> Any:
        logits, after = model_lib.apply(model, params, inputs[None], carry)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[0], targets)
        return jnp.mean(losses, where=counted), (losses, after)

    return jax.grad(mean_loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    trained: model_lib.Params,
    sizes: model_lib.Params,
    state: tuple[model_lib.Params, model_lib.Carry],
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    settings: Settings,
) -> tuple[tuple[model_lib.Params, model_lib.Carry], jax.Array]:
    """Reads segments [number, time]: the adapted parameters with the carry, and losses, flat."""
    leaves = jax.tree.leaves(sizes)
    mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)

    def adapted(p: jax.Array, g: jax.Array, p0: jax.Array, size: jax.Array) -> jax.Array:
        back = jnp.minimum(settings.decay * size / mean, 1)
        return p - settings.learning_rate * g / (size + _FLOOR * mean) + back * (p0 - p)

    def step(state: Any, segment: Any) -> Any:
        params, carry = state
        inputs, targets, counted = segment
        # A segment that is all padding comes after the last token: what it gives is not used.
        counted = counted | ~counted.any()
        gradient, (losses, carry) = _gradient(model, params, carry, inputs, targets, counted)
        return (jax.tree.map(adapted, params, gradient, trained, sizes), carry), losses

    state, losses = jax.lax.scan(step, state, (inputs, targets, counted))
    return state, losses.reshape(-1)
