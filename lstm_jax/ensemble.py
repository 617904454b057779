"""Ensembles: several models whose probabilities are averaged at every step.

The functions take a `LanguageModel` or an `Ensemble`, and for the first are those of `model`.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import model as model_lib
from lstm_jax.model import Carry, LanguageModel, Params, Prepared


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several models with one vocabulary, of any sizes and cells.

    Its parameters are a dict of those of its members, "0", "1", and so on. Its carry is a tuple of
    theirs. Its logits are the logarithms of the arithmetic means of their probabilities.
    """

    members: tuple[LanguageModel, ...]

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens."""
        return self.members[0].vocabulary_size

    def initial_carry(self, batch_size: int) -> Carry:
        """Return the carry at the start of a text."""
        return tuple(member.initial_carry(batch_size) for member in self.members)


Model = LanguageModel | Ensemble


def join_models(models: Sequence[tuple[LanguageModel, Params]]) -> tuple[Ensemble, Params]:
    """Return the ensemble of several models, and its parameters."""
    members, params = zip(*models, strict=True)
    return Ensemble(members), {str(i): own for i, own in enumerate(params)}


def list_members(model: Model, params: Any) -> list[tuple[LanguageModel, Any]]:
    """Return the members of an ensemble with their parameters, or the only model."""
    if isinstance(model, LanguageModel):
        return [(model, params)]
    return [(member, params[str(i)]) for i, member in enumerate(model.members)]


def mix_losses(losses: Sequence[np.ndarray]) -> np.ndarray:
    """Return the losses of an ensemble for the same tokens, from those of its members, in nats."""
    return math.log(len(losses)) - np.logaddexp.reduce(-np.stack(losses))


def apply(
    model: Model, params: Params, ids: jax.typing.ArrayLike, carry: Carry
) -> tuple[jax.Array, Carry]:
    """Run the model over ids [batch, time]; see `model.apply`."""
    if isinstance(model, LanguageModel):
        return model_lib.apply(model, params, ids, carry)
    members = zip(list_members(model, params), carry, strict=True)
    return _mix(model_lib.apply(*member, ids, own) for member, own in members)


def prepare_step(model: Model, params: Params) -> Prepared:
    """Prepare the parameters for `apply_step`; see `model.prepare_step`."""
    if isinstance(model, LanguageModel):
        return model_lib.prepare_step(model, params)
    members = list_members(model, params)
    return {str(i): model_lib.prepare_step(*member) for i, member in enumerate(members)}


def apply_step(
    model: Model, arrays: Prepared, ids: jax.Array, carry: Carry
) -> tuple[jax.Array, Carry]:
    """Run the model over one token of each text, ids [batch]; see `model.apply_step`."""
    if isinstance(model, LanguageModel):
        return model_lib.apply_step(model, arrays, ids, carry)
    members = zip(list_members(model, arrays), carry, strict=True)
    return _mix(model_lib.apply_step(*member, ids, own) for member, own in members)


def _mix(outputs: Iterable[tuple[jax.Array, Carry]]) -> tuple[jax.Array, Carry]:
    """Average the probabilities of members; return the logarithms and all carries."""
    logits, carries = zip(*outputs, strict=True)
    log_probabilities = jnp.stack([jax.nn.log_softmax(own) for own in logits])
    return jax.nn.logsumexp(log_probabilities, axis=0) - math.log(len(logits)), carries
