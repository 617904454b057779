"""The model of the comparisons in other JAX libraries.

Each function returns, for a number of texts, `init`, which maps a key, ids [batch, time] and a
carry to parameters; `apply`, which maps parameters, ids and a carry to logits [batch, time,
vocabulary] and the next carry; and the carry before a text.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Model = tuple[Callable[..., Any], Callable[..., Any], Any]
MakeModel = Callable[[argparse.Namespace, int], Model]


def make_flax(cell: str, options: argparse.Namespace, batch_size: int) -> Model:
    """Make the model of a cell of Flax, as in LSTMCell."""

    def make_cell() -> Any:
        return getattr(nn, cell)(options.hidden_size, dtype=options.dtype)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, ids: Any, carries: Any) -> Any:
            hidden = nn.Embed(options.vocabulary_size, options.embedding_size)(ids)
            last = []
            for carry in carries:
                layer = nn.RNN(make_cell(), return_carry=True)
                carry, hidden = layer(hidden, initial_carry=carry)
                last.append(carry)
            return nn.Dense(options.vocabulary_size, dtype=options.dtype)(hidden), last

    shape = (batch_size, options.hidden_size)
    carries = [make_cell().initialize_carry(jax.random.key(0), shape)] * options.num_layers
    network = Network()
    return network.init, network.apply, carries


MODELS: dict[str, MakeModel] = {
    "Flax LSTMCell": functools.partial(make_flax, "LSTMCell"),
    "Flax OptimizedLSTMCell": functools.partial(make_flax, "OptimizedLSTMCell"),
}
