"""What steers generation: which tokens may be drawn, how likely, and where the text ends."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax.errors import UserError
from lstm_jax.vocabulary import SPECIAL_IDS, Vocabulary

MIN_STATES = 16  # Of an automaton that knows where a text ends.


class Controls(NamedTuple):
    """How the next token is drawn from the model's logits.

    They act in this order, which is the one that people know from elsewhere:

    1. `forbidden` units, "" and "[UNK]" are never drawn.
    2. `repetition_penalty` makes what was read or written lately less likely: the logits of all
       units among the last `repetition_window` tokens are divided by it where they are positive,
       multiplied where they are negative (Keskar et al. 2019).
    3. `temperature` divides the logits.
    4. `top_k` keeps the k likeliest units (Fan et al. 2018).
    5. `top_p` keeps, of these, the fewest likeliest units that have a share of p or more of the
       probability (Holtzman et al. 2020).
    6. `min_p` keeps units at least p times as likely as the likeliest (Nguyen et al. 2024).

    Units that are equally likely are kept together. The draw is from what is left, in proportion.

    Attributes:
      temperature: less than 1 is safer, more is wilder; 0 always takes the likeliest unit.
      top_k: how many units; 0 keeps all.
      top_p: a share in (0, 1]; 1 keeps all.
      min_p: in [0, 1]; 0 keeps all.
      repetition_penalty: 1 is none.
      repetition_window: how many tokens back it looks, the prompt's included.
      forbidden: ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    forbidden: Iterable[int] = ()


DEFAULT_CONTROLS = Controls()  # The model's own distribution, but for "" and "[UNK]".


class ControlArrays(NamedTuple):
    """`Controls` as one compiled function takes them, whatever their values.

    Attributes:
      temperature: float32 [].
      top_k: int32 [], the size of the vocabulary where it keeps all.
      top_p: float32 [].
      min_p: float32 [].
      repetition_penalty: float32 [].
      repetition_window: int32 [].
      forbidden: bool [vocabulary].
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    repetition_window: Any
    forbidden: Any


def make_control_arrays(controls: Controls, vocabulary_size: int) -> ControlArrays:
    """Checks the controls and makes arrays of them.

    Raises:
      UserError: if one is outside its range, or every unit is forbidden.
    """
    for name, holds, allowed in (
        ("temperature", controls.temperature >= 0, "0 or more"),
        ("top_k", controls.top_k >= 0, "0 (all units) or more"),
        ("top_p", 0 < controls.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= controls.min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", 0 < controls.repetition_penalty < np.inf, "above 0 (1 is none)"),
        ("repetition_window", controls.repetition_window >= 0, "0 or more"),
    ):
        if not holds:
            raise UserError(f"{name} is {getattr(controls, name)}: it must be {allowed}")
    forbidden = np.zeros(vocabulary_size, bool)
    forbidden[[*SPECIAL_IDS, *controls.forbidden]] = True
    if forbidden.all():
        raise UserError("every unit of the vocabulary is forbidden: leave some to write with")
    return ControlArrays(
        np.float32(controls.temperature),
        np.int32(min(controls.top_k or vocabulary_size, vocabulary_size)),
        np.float32(controls.top_p),
        np.float32(controls.min_p),
        np.float32(controls.repetition_penalty),
        np.int32(min(controls.repetition_window, 2**29)),
        forbidden,
    )


def adjust_logits(logits: jax.Array, age: jax.Array, controls: ControlArrays) -> jax.Array:
    """The logits of the distribution that is drawn from.

    Args:
      logits: the model's, float32 [batch, vocabulary].
      age: how many tokens ago each unit last stood, 1 for the latest: int32 [batch, vocabulary].
      controls: see `Controls`.

    Returns:
      Float32 [batch, vocabulary], at most 0, and minus infinity for what is never drawn. At
      temperature 0 only the likeliest unit is left (the first of several).
    """
    penalty = jnp.where(age <= controls.repetition_window, controls.repetition_penalty, 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(controls.forbidden, -jnp.inf, logits)
    greedy = controls.temperature == 0
    behind = logits.max(axis=-1, keepdims=True) - logits
    behind /= jnp.where(greedy, 1.0, controls.temperature)
    filtered = ~greedy & ((controls.top_k < logits.shape[-1]) | (controls.top_p < 1))
    keep = jax.lax.cond(
        filtered,
        lambda: _likeliest(behind, controls.top_k, controls.top_p),
        lambda: jnp.ones(behind.shape, bool),
    )
    keep &= behind <= -jnp.log(controls.min_p)
    first = jnp.arange(logits.shape[-1]) == jnp.argmin(behind, axis=-1, keepdims=True)
    return jnp.where(jnp.where(greedy, first, keep), -behind, -jnp.inf)


def _likeliest(behind: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which units top-k and, of those, top-p keep: bool [batch, vocabulary].

    Args:
      behind: how far the units' logits are below the greatest one, float32 [batch, vocabulary].
      top_k: int32 [].
      top_p: float32 [].
    """
    keep = _until(behind, jnp.ones_like(behind), top_k)
    weights = jnp.where(keep, jnp.exp(-behind), 0)
    share = jnp.where(top_p < 1, top_p * weights.sum(axis=-1), jnp.inf)
    return keep & _until(behind, weights, share)


def _until(behind: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Where the weights of all units less far `behind` sum to less than `limit` [] or [batch].

    The limit is found by bisection, with one sum for each bit of a float: XLA's CPU backend is slow
    at sorting.
    """
    # The bits of floats that are not negative are ordered as the floats are.
    bits = jax.lax.bitcast_convert_type(behind, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        nearer = jnp.where(bits < middle[:, None], weights, 0).sum(axis=-1)
        return jnp.where(nearer < limit, middle, low), jnp.where(nearer < limit, high, middle)

    # The greatest bits before which there is less than `limit` are in [low, high).
    start = jnp.zeros(len(behind), jnp.int32), jnp.full(len(behind), 2**31 - 1, jnp.int32)
    last, _ = jax.lax.fori_loop(0, 31, halve, start)
    return bits <= last[:, None]


def make_stop_table(
    vocabulary: Vocabulary, stop_token: bool = True, stop_at: str = ""
) -> np.ndarray:
    """A finite automaton that knows where a text ends: int32 [states, vocabulary].

    It starts in state 0, each token takes it from state s to table[s, token], and in the last state
    the text ends and stays ended. The number of states is a power of two, so that one compiled
    function serves many stop texts.

    Args:
      vocabulary: its units are the tokens.
      stop_token: whether the vocabulary's stop token, if it has one, ends the text.
      stop_at: a text that ends it as soon as it was written whole ("" for none), even where it
        begins or ends within a unit.
    """
    wanted = "".join(vocabulary.split(stop_at))
    number = {character: i for i, character in enumerate(dict.fromkeys(wanted))}
    other, nothing = len(number), len(number) + 1
    # Knuth, Morris & Pratt 1977: `steps[s]` says where each character leads after s of them fit.
    steps = np.zeros((len(wanted) + 1, len(number) + 2), np.int32)
    fallback = 0
    for state, character in enumerate(wanted):
        steps[state] = steps[fallback]
        steps[state, number[character]] = state + 1
        fallback = steps[fallback, number[character]] if state else 0
    steps[-1] = len(wanted)
    steps[:, nothing] = np.arange(len(wanted) + 1)

    # Of a long unit only both ends matter, or that it holds the text, so that memory does not grow
    # with the longest unit.
    end = len(wanted)
    longest = min(max(map(len, vocabulary.tokens)), 2 * end + 1)
    units = np.full((len(vocabulary), longest), nothing)
    for row, unit in zip(units, vocabulary.tokens, strict=True):
        if wanted in unit:
            unit = wanted
        is_long = len(unit) > 2 * end
        ends = unit[:end] + unit[-end:] if is_long else unit
        numbers = [number.get(character, other) for character in ends]
        if is_long:
            numbers.insert(end, other)
        row[: len(numbers)] = numbers
    table = np.tile(np.arange(len(wanted) + 1)[:, None], len(vocabulary))
    for characters in units.T:
        table = steps[table, characters]

    last = max(MIN_STATES, 1 << len(wanted).bit_length()) - 1
    if wanted:
        table = np.where(table == len(wanted), last, table)
    table = np.pad(table, ((0, last + 1 - len(table)), (0, 0)))
    table[last] = last
    if stop_token and vocabulary.stop_id is not None:
        table[:, vocabulary.stop_id] = last
    return table.astype(np.int32)


def can_end(table: np.ndarray, forbidden: np.ndarray) -> bool:
    """Whether any tokens but the `forbidden` (bool [vocabulary]) lead a `make_stop_table` to its end."""
    reached = np.zeros(1, np.int64)
    while True:
        further = np.union1d(reached, table[reached][:, ~forbidden])
        if len(further) == len(reached):
            return len(table) - 1 in reached
        reached = further
