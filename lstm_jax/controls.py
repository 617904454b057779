"""Sampling controls: which tokens may be drawn, how probable they are, and where a text ends."""

import itertools
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax.errors import UserError
from lstm_jax.vocabulary import SPECIAL_IDS, Vocabulary


class Controls(NamedTuple):
    """Settings for drawing the next token from the model's logits.

    They are applied in the usual order:

    1. `forbidden` tokens, "" and "[UNK]" are never drawn.
    2. `repetition_penalty` makes recent tokens less likely: it divides the positive and multiplies
       the negative logits of all tokens among the last `repetition_window` (Keskar et al. 2019).
    3. `temperature` divides the logits.
    4. `top_k` keeps the k most probable tokens (Fan et al. 2018).
    5. `top_p` keeps, of these, the nucleus: the smallest set of most probable tokens with a
       cumulative probability of at least p (Holtzman et al. 2020).
    6. `min_p` keeps tokens at least p times as probable as the most probable (Nguyen et al. 2024).

    Top-k and top-p keep all tokens that tie with the last one kept. The next token is then
    drawn from the remaining ones, in proportion to their probabilities.
    """

    temperature: float = 1.0  # 0 is greedy decoding.
    top_k: int = 0  # A number of tokens; 0 keeps all.
    top_p: float = 1.0  # In (0, 1]; 1 keeps all.
    min_p: float = 0.0  # In [0, 1]; 0 keeps all.
    repetition_penalty: float = 1.0  # 1 is no penalty.
    repetition_window: int = 64  # A number of tokens, including the prompt's.
    forbidden: Collection[int] = ()  # Ids.


DEFAULT_CONTROLS = Controls()  # The model's own distribution, without "" and "[UNK]".

# The numbers that flags and functions take: the type, which values are allowed, in words.
_NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: x == 0 or 1e-6 <= x <= 1e6, "0, or from 1e-6 to 1e6"),
    "top_k": (Integral, lambda x: x >= 0, "0 (all tokens) or more"),
    "top_p": (Real, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": (Real, lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1,000 (1 is none)"),
    "repetition_window": (Integral, lambda x: x >= 0, "0 or more"),
    "length": (Integral, lambda x: 1 <= x <= 10**6, "from 1 to 1,000,000"),
    "piece_length": (Integral, lambda x: 1 <= x <= 1024, "from 1 to 1,024"),
    "seed": (Integral, lambda x: 0 <= x < 2**32, "from 0 to 4,294,967,295"),
    "num_samples": (Integral, lambda x: 1 <= x <= 10**5, "from 1 to 100,000"),
    "n": (Integral, lambda x: x >= 1, "1 or more"),
}


def check_number(name: str, value: Any) -> None:
    """Raise `UserError` if `value` is not allowed for the flag or argument `name`."""
    kind, holds, words = _NUMBERS[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        words = "a whole number" if kind is Integral else "a number"
    elif holds(value):
        return
    raise UserError(f"{name} is {value!r}: it must be {words}")


class ControlArrays(Controls):
    """`Controls` as float32 and int32 scalars, so that one compiled function serves all values."""

    forbidden: Any  # Bool [vocabulary].


def make_control_arrays(controls: Controls, vocabulary_size: int) -> ControlArrays:
    """Check the controls and convert them to arrays.

    Raises:
      UserError: if one is outside its range, or if every token is forbidden.
    """
    arrays: dict[str, Any] = {}
    for name, value in controls._asdict().items():
        if name != "forbidden":
            check_number(name, value)
            is_real = _NUMBERS[name][0] is Real
            arrays[name] = np.float32(value) if is_real else np.int32(min(value, 2**29))
    if not isinstance(controls.forbidden, Collection):
        raise UserError(f"forbidden is {controls.forbidden!r}: it must be a list of ids of tokens")
    ids = [*controls.forbidden]
    for token_id in ids:
        if not isinstance(token_id, Integral) or not 0 <= int(token_id) < vocabulary_size:
            raise UserError(
                f"forbidden has {token_id!r}: it must be a list of ids of tokens, from 0 to "
                f"{vocabulary_size - 1}"
            )
    forbidden = np.zeros(vocabulary_size, bool)
    forbidden[[*SPECIAL_IDS, *ids]] = True
    if forbidden.all():
        raise UserError("every token of the vocabulary is forbidden: allow at least one")
    return ControlArrays(**arrays, forbidden=forbidden)


def adjust_logits(logits: jax.Array, age: jax.Array, controls: ControlArrays) -> jax.Array:
    """Apply the controls to the model's logits, float32 [batch, vocabulary].

    Age, int32 [batch, vocabulary], is the number of tokens since each token last occurred, 1 for
    the latest.

    Returns:
      The logits to draw from, float32 [batch, vocabulary]: at most 0, and minus infinity for tokens
      that are never drawn. At temperature 0 only the first of the most probable tokens is left.
    """
    penalty = jnp.where(age <= controls.repetition_window, controls.repetition_penalty, 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(controls.forbidden[None], -jnp.inf, logits)
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


class Stops(NamedTuple):
    """Where texts end."""

    token_id: int = -1  # The stop token; -1 for none.
    text: bytes = b""  # A text also ends with the token that completes this; empty for none.
    tokens: tuple[bytes, ...] = ()  # Of the vocabulary, as bytes, in which `text` is searched.


NO_STOPS = Stops()


def make_stops(vocabulary: Vocabulary, stop_token: bool = True, stop_at: str = "") -> Stops:
    """Make the stops of the vocabulary's stop token, unless `stop_token` is false, and `stop_at`.

    The string `stop_at` ends a text even if it starts or ends within a token.
    """
    token_id = vocabulary.stop_id if stop_token and vocabulary.stop_id is not None else -1
    if not stop_at:
        return Stops(token_id)
    text, *tokens = (t.encode("utf-8", "surrogateescape") for t in (stop_at, *vocabulary.tokens))
    return Stops(token_id, text, tuple(tokens))


class StopSearch:
    """Search one text for `Stops.text`, as its tokens are generated."""

    def __init__(self, stops: Stops) -> None:
        self._stops = stops
        self._tail = b""  # The end of the text so far, in which the stop text may begin.

    def find_end(self, ids: np.ndarray) -> int | None:
        """Return the number of the next `ids` up to the end of the text; None if it continues."""
        wanted, pieces = self._stops.text, [self._stops.tokens[i] for i in ids]
        text = self._tail + b"".join(pieces)
        start = text.find(wanted)
        if start < 0:
            self._tail = text[max(len(text) - len(wanted) + 1, 0) :]
            return None
        lengths = itertools.accumulate(map(len, pieces), initial=len(self._tail))
        return next(n for n, length in enumerate(lengths) if length >= start + len(wanted))
