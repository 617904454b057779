"""Regularize training, from the `regularization` fields of a config.

Dropout masks are drawn once per step and are the same at every position of its windows. Kept values
are divided by the probability of keeping them, so that expectations do not change.
"""

import jax
import jax.numpy as jnp

from lstm_jax.config import RegularizationConfig
from lstm_jax.errors import UserError
from lstm_jax.model import LanguageModel, Masks, Params


def is_random(rates: RegularizationConfig) -> bool:
    """Return whether any of the rates draws masks."""
    dropouts = rates.embedding_dropout, rates.input_dropout, rates.hidden_dropout
    return any((*dropouts, rates.output_dropout, rates.recurrent_dropout))


def draw_masks(
    rates: RegularizationConfig, model: LanguageModel, key: jax.Array, batch_size: int
) -> Masks:
    """Draw masks for locked (variational) dropout (Gal & Ghahramani 2016).

    `input_dropout` applies to the inputs of the first layer, `hidden_dropout` between layers, and
    `output_dropout` to the outputs of the last one. Each text of the batch has its own masks,
    float32 [batch_size, features]; they are None where the rate is 0.
    """
    between = [rates.hidden_dropout] * (model.num_layers - 1)
    by_place = [rates.input_dropout, *between, rates.output_dropout]
    keys = jax.random.split(key, len(by_place))
    # Drawn feature-major, as the recurrence computes: XLA's CPU backend is four times slower at
    # multiplying by the transpose of an array.
    return [
        _draw_mask(key, rate, (size, batch_size)).T if rate else None
        for key, rate, size in zip(keys, by_place, model.sizes, strict=True)
    ]


def drop_parameters(rates: RegularizationConfig, params: Params, key: jax.Array) -> Params:
    """Set a random part of the parameters to zero (Merity et al. 2018).

    `embedding_dropout` drops rows of the embedding table, that is all occurrences of a token (Gal &
    Ghahramani 2016). `recurrent_dropout` drops individual weights of the recurrent kernels
    (DropConnect, Wan et al. 2013), in all layers; raise `UserError` if there are none.
    """
    dropped = dict(params)
    if rates.embedding_dropout:
        table = params["embedding"]["embedding"]
        mask = _draw_mask(jax.random.fold_in(key, 0), rates.embedding_dropout, (len(table), 1))
        dropped["embedding"] = {"embedding": table * mask}
    if rates.recurrent_dropout:
        leaves, structure = jax.tree_util.tree_flatten_with_path(dropped)
        kernels = [i for i, (path, _) in enumerate(leaves) if path[-1].key == "recurrent_kernel"]
        if not kernels:
            raise UserError(
                "config.regularization.recurrent_dropout needs a cell with a parameter "
                "recurrent_kernel: set it to 0"
            )
        arrays = [array for _, array in leaves]
        for number, i in enumerate(kernels, start=1):
            layer_key = jax.random.fold_in(key, number)
            arrays[i] *= _draw_large_mask(layer_key, rates.recurrent_dropout, arrays[i].shape)
        dropped = jax.tree.unflatten(structure, arrays)
    return dropped


def _draw_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw 0 with probability `rate`, otherwise 1 / (1 - rate)."""
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def _draw_large_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw a mask like `_draw_mask` from 16 random bits an entry; the rate is rounded to 16 bits.

    JAX draws a word of 32 bits even for 16, so each word is split in two. For the kernel of a
    layer with 1,024 hidden units this takes 9 ms on a core, and `jax.random.bernoulli` 26 ms.
    """
    words = jax.random.bits(key, (-(-shape[0] // 2), *shape[1:]), "uint32")
    bits = jnp.concatenate([words >> 16, words & 0xFFFF])[: shape[0]]
    kept = jnp.maximum(jnp.round((1 - rate) * 2**16), 1)
    return (bits < kept) * (2**16 / kept)
