"""What training adds against overfitting, as the `regularization` fields of a config say.

Masks are drawn once for a step and are the same at every position of its windows. What is kept is
divided by the chance to be kept, so that the expectation stays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lstm_jax import model as model_lib


def is_random(rates: ConfigDict) -> bool:
    """Whether any of the fields draws masks."""
    return any(is_on(value) for name, value in rates.items() if name.endswith("_dropout"))


def is_on(rate: float | jax.Array) -> bool:
    """Whether a rate does anything; one that the compiled program reads as an array always may."""
    return isinstance(rate, jax.Array) or bool(rate)


def draw_masks(
    rates: ConfigDict, model: model_lib.LanguageModel, key: jax.Array, batch_size: int
) -> model_lib.Masks:
    """Locked (variational) dropout of layer inputs and outputs (Gal & Ghahramani 2016).

    `input_dropout` is for what goes into the first layer, `hidden_dropout` between layers, and
    `output_dropout` for what comes out of the last one. Each member of the batch has its own mask.

    Returns:
      The masks, float32 [batch_size, features] or None, in the order of `model.Masks`.
    """
    between = [rates.hidden_dropout] * (model.num_layers - 1)
    by_place = [rates.input_dropout, *between, rates.output_dropout]
    keys = jax.random.split(key, len(by_place))
    return [
        _mask(key, rate, (batch_size, size)) if is_on(rate) else None
        for key, rate, size in zip(keys, by_place, model.sizes, strict=True)
    ]


def drop_parameters(
    rates: ConfigDict, params: model_lib.Params, key: jax.Array
) -> model_lib.Params:
    """Parameters with a random part of them zero (Merity et al. 2018).

    `embedding_dropout` drops whole rows of the embedding table, so that a token is missing wherever
    it occurs (Gal & Ghahramani 2016); `recurrent_dropout` single weights of the recurrent kernels
    (DropConnect, Wan et al. 2013).
    """
    dropped = dict(params)
    if is_on(rates.embedding_dropout):
        table = params["embedding"]["embedding"]
        mask = _mask(jax.random.fold_in(key, 0), rates.embedding_dropout, (len(table), 1))
        dropped["embedding"] = {"embedding": table * mask}
    if is_on(rates.recurrent_dropout):
        layers = [name for name in params if "recurrent_kernel" in params[name]]
        for number, name in enumerate(sorted(layers), start=1):
            kernel = params[name]["recurrent_kernel"]
            mask = _mask(jax.random.fold_in(key, number), rates.recurrent_dropout, kernel.shape)
            dropped[name] = {**params[name], "recurrent_kernel": kernel * mask}
    return dropped


def penalty(rates: ConfigDict, outputs: jax.Array, dropped: jax.Array) -> Any:
    """Activation and temporal activation regularisation (Merity et al. 2017), in nats.

    Args:
      rates: the `regularization` fields.
      outputs: of the last layer, [batch, time, features].
      dropped: the same after dropout.

    Returns:
      `activation_penalty` times the mean square of `dropped`, plus `temporal_activation_penalty`
      times the mean square of the difference between one step's outputs and the next's.
    """
    added: Any = 0.0
    if is_on(rates.activation_penalty):
        added += rates.activation_penalty * jnp.mean(dropped**2)
    if is_on(rates.temporal_activation_penalty) and outputs.shape[1] > 1:
        differences = outputs[:, 1:] - outputs[:, :-1]
        added += rates.temporal_activation_penalty * jnp.mean(differences**2)
    return added


def _mask(key: jax.Array, rate: float | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zero with a chance of `rate`, else 1 / (1 - rate)."""
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)
