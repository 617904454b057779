"""Average the probabilities of several trained models at every step: ensembles."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lstm_jax.model import Carry, LanguageModel, Params, Prepared


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several models with one vocabulary, of any sizes and cells.

    It has the methods of a `LanguageModel` that measuring a loss and generating text need. Its
    parameters and its carry are tuples of its members'. Its logits are the logarithms of the
    arithmetic means of their probabilities.
    """

    members: tuple[LanguageModel, ...]

    @property
    def vocabulary_size(self) -> int:
        """Return the number of tokens."""
        return self.members[0].vocabulary_size

    def initial_carry(self, batch_size: int) -> Carry:
        """Return the carry at the start of a text."""
        return tuple(member.initial_carry(batch_size) for member in self.members)

    def apply(
        self, variables: Mapping[str, tuple[Params, ...]], ids: jax.Array, carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """Run the members over ids [batch, time]; see `LanguageModel.__call__`."""
        parts = zip(self.members, variables["params"], carry, strict=True)
        return _mix(member.apply({"params": part}, ids, old) for member, part, old in parts)

    def measure(
        self, params: tuple[Params, ...], inputs: jax.Array, targets: jax.Array, carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """Compute the loss of each target, [batch, time]; see `LanguageModel.measure`."""
        parts = zip(self.members, params, carry, strict=True)
        results = [member.measure(part, inputs, targets, old) for member, part, old in parts]
        losses, carries = zip(*results, strict=True)
        return mix_losses(losses), carries

    def prepare_step(self, params: tuple[Params, ...]) -> tuple[Prepared, ...]:
        """Prepare the parameters for `apply_step`."""
        pairs = zip(self.members, params, strict=True)
        return tuple(member.prepare_step(part) for member, part in pairs)

    def apply_step(
        self, prepared: tuple[Prepared, ...], ids: jax.Array, carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """Run the members over one token of each text, ids [batch]."""
        parts = zip(self.members, prepared, carry, strict=True)
        return _mix(member.apply_step(part, ids, old) for member, part, old in parts)


def list_members(model: Any, params: Any) -> list[tuple[LanguageModel, Params]]:
    """Return each model of an ensemble with its parameters; of a model, itself."""
    if not isinstance(model, Ensemble):
        return [(model, params)]
    return list(zip(model.members, params, strict=True))


def mix_losses(losses: Sequence[ArrayLike]) -> jax.Array:
    """Return the losses of an ensemble from its members' losses for the same tokens, in nats."""
    return math.log(len(losses)) - jax.nn.logsumexp(-jnp.stack(losses), axis=0)


def _mix(outputs: Iterable[Any]) -> tuple[jax.Array, Carry]:
    """Average the probabilities of members; return the logarithms and all carries."""
    logits, carries = zip(*outputs, strict=True)
    log_probabilities = jnp.stack([jax.nn.log_softmax(part) for part in logits])
    return jax.nn.logsumexp(log_probabilities, axis=0) - math.log(len(logits)), carries
