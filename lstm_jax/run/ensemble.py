"""Average the probabilities of several trained models at every step: ensembles."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lstm_jax.errors import UserError
from lstm_jax.model import Carry, LanguageModel, Params, Prepared
from lstm_jax.run import workdir


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several models with one vocabulary, of any sizes and cells.

    It has the methods of a `LanguageModel` that measuring a loss and generating text need. Its
    parameters are a dict of its members' parameters, "0", "1", and so on. Its carry is a tuple of
    theirs. Its logits are the logarithms of the arithmetic means of their probabilities.
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
        self, variables: Mapping[str, Params], ids: jax.Array, carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """Run the members over ids [batch, time]; see `LanguageModel.__call__`."""
        pairs = zip(self.pair_with(variables["params"]), carry, strict=True)
        return _mix(member.apply({"params": part}, ids, before) for (member, part), before in pairs)

    def prepare_step(self, params: Params) -> Prepared:
        """Prepare the parameters for `apply_step`."""
        pairs = self.pair_with(params)
        return {str(i): member.prepare_step(part) for i, (member, part) in enumerate(pairs)}

    def apply_step(self, arrays: Prepared, ids: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        """Run the members over one token of each text, ids [batch]."""
        pairs = zip(self.pair_with(arrays), carry, strict=True)
        return _mix(member.apply_step(part, ids, before) for (member, part), before in pairs)

    def pair_with(self, params: Any) -> list[tuple[LanguageModel, Any]]:
        """Return each member with its parameters."""
        return [(member, params[str(i)]) for i, member in enumerate(self.members)]


def load_ensemble(
    workdirs: Sequence[Path | str], dtype: str | None = None
) -> tuple[workdir.Trained, list[int]]:
    """Load the model in each directory: the only one, or an `Ensemble` of all; return their steps.

    For `dtype`, see `workdir.load_trained`.

    Raises:
      UserError: as `workdir.load_trained`, or if the vocabulary, the text or its splits differ.
    """
    first, *others = members = [workdir.load_trained(path, dtype) for path in workdirs]
    for path, other in zip(workdirs[1:], others, strict=True):
        for name, ours, theirs in (
            ("vocabularies", first.vocabulary.to_fields(), other.vocabulary.to_fields()),
            ("texts or splits", first.config.data.sha256, other.config.data.sha256),
        ):
            if ours != theirs:
                raise UserError(
                    f"{workdirs[0]} and {path} have different {name}: the models of an ensemble "
                    "must be trained on one text, with one vocabulary"
                )
    if others:
        model, params = join_models([(member.model, member.params) for member in members])
        first = first._replace(model=model, params=params)
    return first, [member.step for member in members]


def join_models(models: Sequence[tuple[LanguageModel, Params]]) -> tuple[Any, Params]:
    """Return the `Ensemble` of several models, and its parameters."""
    members, params = zip(*models, strict=True)
    return Ensemble(members), {str(i): part for i, part in enumerate(params)}


def list_members(model: Any, params: Params) -> list[tuple[LanguageModel, Any]]:
    """Return each model of an ensemble with its parameters; of a model, itself."""
    return model.pair_with(params) if isinstance(model, Ensemble) else [(model, params)]


def _mix(outputs: Iterable[Any]) -> tuple[jax.Array, Carry]:
    """Average the probabilities of members; return the logarithms and all carries."""
    logits, carries = zip(*outputs, strict=True)
    log_probabilities = jnp.stack([jax.nn.log_softmax(part) for part in logits])
    return jax.nn.logsumexp(log_probabilities, axis=0) - math.log(len(logits)), carries
