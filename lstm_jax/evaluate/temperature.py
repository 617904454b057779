"""Divide the logits of a model by a temperature, the best one for a text."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstm_jax import loss as loss_lib
from lstm_jax.model import Carry, LanguageModel, Params, apply, first_carry
from lstm_jax.vocabulary import Ids

_TEMPERATURES = np.linspace(0.7, 1.5, 81).round(2)  # Those that `fit_temperature` compares.


@dataclasses.dataclass(frozen=True)
class Tempered:
    """A model, or an ensemble, whose logits are divided by a temperature, to measure its loss."""

    model: LanguageModel
    temperature: float

    def initial_carry(self, batch_size: int) -> Carry:
        """Return the carry at the start of a text."""
        return self.model.initial_carry(batch_size)

    def apply(
        self, variables: Mapping[str, Params], ids: jax.Array, carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """Run the model over ids [batch, time]; see `LanguageModel.__call__`."""
        logits, carry = apply(self.model, variables["params"], ids, carry)
        return logits / self.temperature, carry


def fit_temperature(model: LanguageModel, params: Params, ids: Ids) -> float:
    """Return the softmax temperature with the smallest loss over a text, to two decimals."""
    carry = first_carry(model, params, loss_lib.count_streams(ids))
    totals = np.zeros(len(_TEMPERATURES))
    for chunk in loss_lib.iterate_chunks(ids):
        sums, carry = _sum_losses(model, params, chunk, carry)
        totals += np.asarray(sums, np.float64)
    return float(_TEMPERATURES[totals.argmin()])


@functools.partial(jax.jit, static_argnames="model")
def _sum_losses(
    model: LanguageModel, params: Params, chunk: loss_lib.Chunk, carry: Carry
) -> tuple[jax.Array, Carry]:
    """Return the sum of a chunk's losses for each of the temperatures, and the next carry."""
    inputs, targets, counted = chunk
    logits, carry = apply(model, params, inputs, carry)

    def sum_losses(temperature: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits / temperature, targets)
        return losses.sum(where=counted)

    return jax.lax.map(sum_losses, jnp.asarray(_TEMPERATURES, jnp.float32)), carry
