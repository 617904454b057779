"""Sampling controls: which tokens may be drawn, and how probable they are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import config
from lstm_jax.vocabulary import SPECIAL_IDS


class Controls(NamedTuple):
    """Settings for drawing the next token from the model's logits.

    They are applied in the usual order:

    1. `temperature` divides the logits; "" and "[UNK]" are never drawn.
    2. `top_k` keeps the k most probable tokens (Fan et al. 2018).
    3. `top_p` keeps, of these, the nucleus: the smallest set of most probable tokens with a
       cumulative probability of at least p (Holtzman et al. 2020).
    4. `min_p` keeps tokens at least p times as probable as the most probable (Nguyen et al. 2024).

    Top-k and top-p keep all tokens that tie with the last one kept. The next token is then
    drawn from the remaining ones, in proportion to their probabilities.
    """

    temperature: Any = 1.0  # 0 is greedy decoding.
    top_k: Any = 0  # A number of tokens; 0 keeps all.
    top_p: Any = 1.0  # In (0, 1]; 1 keeps all.
    min_p: Any = 0.0  # In [0, 1]; 0 keeps all.


DEFAULT_CONTROLS = Controls()  # The model's own distribution, without "" and "[UNK]".

# The type and the condition of each number that flags and functions take, as in `config.Field`.
_NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "x == 0 or 1e-6 <= x <= 1e6"),
    "top_k": (int, "0 <= x < 2**31"),
    "top_p": (float, "0 < x <= 1"),
    "min_p": (float, "0 <= x <= 1"),
    "length": (int, "1 <= x <= 10**6"),
    "piece_length": (int, "1 <= x <= 1024"),
    "seed": (int, "0 <= x < 2**32"),
    "num_samples": (int, "1 <= x <= 10**5"),
    "n": (int, "x >= 1"),
}


def check_number(name: str, value: Any) -> Any:
    """Return a number; raise `UserError` if the flag or argument `name` can't have it."""
    return config.check_number(name, value, *_NUMBERS[name])


def make_control_arrays(controls: Controls) -> Controls:
    """Convert controls to float32 and int32, so that one compiled function serves all values.

    Raise `UserError` if one is outside its range.
    """
    checked = Controls(*map(check_number, Controls._fields, controls))
    return Controls(*(np.float32(x) if isinstance(x, float) else np.int32(x) for x in checked))


def adjust_logits(logits: jax.Array, controls: Controls) -> jax.Array:
    """Apply the controls, of `make_control_arrays`, to logits, float32 [batch, vocabulary].

    Returns:
      The logits to draw from, float32 [batch, vocabulary]: at most 0, and minus infinity for tokens
      that are never drawn. At temperature 0 only the first of the most probable tokens is left.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1])[None] < len(SPECIAL_IDS), -jnp.inf, logits)
    greedy = controls.temperature == 0
    gaps = logits.max(axis=-1, keepdims=True) - logits  # To the most probable token.
    gaps /= jnp.where(greedy, 1.0, controls.temperature)

    def filter_top() -> jax.Array:
        """Return a mask of the tokens that top-k and then top-p keep."""
        top_k = jnp.where(controls.top_k > 0, controls.top_k, logits.shape[-1])
        keep = _filter_until(gaps, jnp.ones_like(gaps), top_k)
        weights = jnp.where(keep, jnp.exp(-gaps), 0)
        limit = jnp.where(controls.top_p < 1, controls.top_p * weights.sum(axis=-1), jnp.inf)
        return keep & _filter_until(gaps, weights, limit)

    filtered = ~greedy & ((controls.top_k > 0) | (controls.top_p < 1))
    keep = jax.lax.cond(filtered, filter_top, lambda: jnp.ones(gaps.shape, bool))
    keep &= gaps <= -jnp.log(controls.min_p)
    first = jnp.arange(logits.shape[-1])[None] == jnp.argmin(gaps, axis=-1, keepdims=True)
    return jnp.where(jnp.where(greedy, first, keep), -gaps, -jnp.inf)


def _filter_until(distances: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Return where the weights of all tokens with smaller `distances` sum to less than `limit`.

    Distances are not negative. Bisection finds the largest such distance, with one sum for each bit
    of a float: XLA's CPU backend is slow at sorting, which took 8 to 15 times as long for
    vocabularies of 7,552 and 33,000 tokens.
    """
    # The bits of non-negative floats are ordered like the floats.
    bits = jax.lax.bitcast_convert_type(distances, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        below = jnp.where(bits < middle[:, None], weights, 0).sum(axis=-1)
        return jnp.where(below < limit, middle, low), jnp.where(below < limit, high, middle)

    # The largest bits with less than `limit` below them are in [low, high).
    start = jnp.zeros(len(bits), jnp.int32), jnp.full(len(bits), 2**31 - 1, jnp.int32)
    last, _ = jax.lax.fori_loop(0, 31, halve, start)
    return bits <= last[:, None]
