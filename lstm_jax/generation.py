"""Generate text: one jitted loop reads the prompt, another draws tokens and feeds them back.

`Controls` say which tokens may be drawn, and how probable they are.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from lstm_jax import config as config_lib
from lstm_jax.errors import NotFiniteError
from lstm_jax.loss import round_length
from lstm_jax.model import Carry, LanguageModel, Params, Prepared, Tokens
from lstm_jax.vocabulary import PADDING_ID, SPECIAL_IDS, Vocabulary

Prompts = Integer[np.ndarray, "batch time"]


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
_RANGES: dict[str, tuple[type, str]] = {
    "temperature": (float, "x == 0 or 1e-6 <= x <= 1e6"),
    "top_k": (int, "0 <= x < 2**31"),
    "top_p": (float, "0 < x <= 1"),
    "min_p": (float, "0 <= x <= 1"),
    "length": (int, "1 <= x <= 10**6"),
    "seed": (int, "0 <= x < 2**32"),
    "num_samples": (int, "1 <= x <= 10**5"),
    "n": (int, "x >= 1"),
}


def check_number(name: str, value: Any) -> Any:
    """Return a number; raise `UserError` if the flag or argument `name` can't have it."""
    return config_lib.check_number(name, value, *_RANGES[name])


def make_control_arrays(controls: Controls) -> Controls:
    """Convert controls to float32 and int32, so that one compiled function serves all values.

    Raise `UserError` if one is outside its range.
    """
    numbers = Controls(*map(check_number, Controls._fields, controls))
    return Controls(*(np.float32(x) if isinstance(x, float) else np.int32(x) for x in numbers))


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

    def find_largest_gap() -> jax.Array:
        """Return the largest gap of the tokens that top-k and then top-p keep, [batch, 1]."""
        ascending, size = jnp.sort(gaps, axis=-1), gaps.shape[-1]
        top_k = jnp.where(controls.top_k > 0, jnp.minimum(controls.top_k, size), size)
        keep = ascending <= ascending[:, top_k - 1][:, None]
        weights = jnp.where(keep, jnp.exp(-ascending), 0)
        sums = jnp.cumsum(weights, axis=-1)  # Of each token and those before it.
        is_nucleus = sums - weights < controls.top_p * weights.sum(axis=-1, keepdims=True)
        keep &= is_nucleus | (controls.top_p == 1)
        return ascending.max(axis=-1, keepdims=True, where=keep, initial=0)

    has_filter = ~greedy & ((controls.top_k > 0) | (controls.top_p < 1))
    unlimited = jnp.full_like(gaps[:, :1], jnp.inf)
    # Sorting takes time.
    keep = gaps <= jax.lax.cond(has_filter, find_largest_gap, lambda: unlimited)
    keep &= gaps <= -jnp.log(controls.min_p)
    first = jnp.arange(logits.shape[-1])[None] == jnp.argmin(gaps, axis=-1, keepdims=True)
    return jnp.where(jnp.where(greedy, first, keep), -gaps, -jnp.inf)


def draw_uniform(
    key: Array, batch_size: int, positions: Int[Array, " n"]
) -> Float[Array, "batch n"]:
    """Draw the uniform random numbers that determine the tokens at `positions`.

    They are in [0, 1). Each depends only on the key, its index in the batch, and its position,
    counted from the start of the prompt.
    """
    fold_all = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold_all, (0, None))(fold_all(key, jnp.arange(batch_size)), positions)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32)))(keys)


def draw_tokens(
    logits: Float[Array, "batch vocabulary"], uniform: Float[Array, " batch"]
) -> Int[Array, " batch"]:
    """Draw tokens by inverse transform sampling.

    The logits are those of `adjust_logits`; the uniform random numbers are in [0, 1).
    """
    probabilities = jnp.exp(logits)
    # A parallel sum may not be monotonic: it could pass the number at a token of probability 0.
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0)
    passed = cumulative > uniform[:, None] * cumulative.max(axis=-1, keepdims=True)
    return jnp.argmax(passed, axis=-1).astype(jnp.int32)


class State(NamedTuple):
    """The state of a batch of texts, from which generation continues."""

    logits: Float[Array, "batch vocabulary"]  # Of the next token.
    carry: Carry  # The model's.
    position: Int[Array, ""]  # The number of tokens so far.
    ended: Bool[Array, " batch"]  # Which texts have ended.


@jax.jit(static_argnames="model")
def prepare_params(model: LanguageModel, params: Params) -> Prepared:
    """Prepare the parameters of a model, or of an `Ensemble`, for the functions below."""
    return model.prepare_step(params)


@jax.jit(static_argnames=("model", "batch_size"), keep_unused=True)
def initial_state(model: LanguageModel, prepared: Prepared, batch_size: int = 1) -> State:
    """Return the state before the first token, whose logits are zeros; see `model.first_carry`."""
    logits = jnp.zeros((batch_size, model.vocabulary_size), jnp.float32)
    ended = jnp.zeros(batch_size, bool)
    return State(logits, model.initial_carry(batch_size), jnp.zeros((), jnp.int32), ended)


def read_tokens(model: LanguageModel, prepared: Prepared, state: State, ids: Prompts) -> State:
    """Read ids of any length, with parameters from `prepare_params`.

    All lengths up to the same power of two share one compiled function.
    """
    time = ids.shape[1]
    ids = np.pad(ids, ((0, 0), (0, round_length(time) - time)))
    return _read(model, prepared, state, ids, np.int32(time))


@jax.jit(static_argnames="model")
def _read(model: LanguageModel, prepared: Prepared, state: State, ids: Any, count: Any) -> State:
    """Read the first `count` of ids [batch, time]."""
    read_one = functools.partial(_read_one, model, prepared)
    return jax.lax.fori_loop(0, count, lambda t, state: read_one(state, ids[:, t]), state)


def _read_one(model: LanguageModel, prepared: Prepared, state: State, ids: Tokens) -> State:
    logits, carry = model.apply_step(prepared, ids, state.carry)
    logits = logits.astype(jnp.float32)
    return state._replace(logits=logits, carry=carry, position=state.position + 1)


# The most tokens of one call of the compiled function.
_CHUNK = 1024
# Ids, the number of tokens generated, the state.
_Loop = tuple[Int[Array, "batch size"], Int[Array, ""], State]


@jax.jit(static_argnames="model")
def _generate(
    model: LanguageModel,
    prepared: Prepared,
    state: State,
    key: Array,
    controls: Controls,
    stop_id: Int[Array, ""],
    count: Int[Array, ""],
) -> _Loop:
    """Generate `count` tokens, at most `_CHUNK`, or fewer if all texts end earlier."""
    batch_size = len(state.logits)
    # Drawing all at once is nearly free. In the loop, on a CPU, it would take half as long as a
    # step of a model with 1,024 hidden units.
    uniform = draw_uniform(key, batch_size, state.position + jnp.arange(_CHUNK))

    def generate_one(loop: _Loop) -> _Loop:
        ids, t, state = loop
        tokens = draw_tokens(adjust_logits(state.logits, controls), uniform[:, t])
        tokens = jnp.where(state.ended, PADDING_ID, tokens)
        state = _read_one(model, prepared, state, tokens)
        state = state._replace(ended=state.ended | (tokens == stop_id))
        return ids.at[:, t].set(tokens), t + 1, state

    ids = jnp.full((batch_size, _CHUNK), PADDING_ID, jnp.int32)
    start = ids, jnp.zeros((), jnp.int32), state
    is_unfinished = lambda loop: (loop[1] < count) & ~loop[2].ended.all()  # noqa: E731
    return jax.lax.while_loop(is_unfinished, generate_one, start)


def generate_chunks(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    key: Array,
    controls: Controls = DEFAULT_CONTROLS,
    *,
    length: int,
    stop_id: int | None = None,
    num_samples: int = 1,
) -> Iterator[np.ndarray]:
    """Continue prompts chunk by chunk, by up to `length` tokens each, or up to a stop token.

    With several samples, the only prompt has that number of continuations. The tokens of text b
    depend on `key`, b and the position in the text, but not on the size of the batch or the chunks.
    A chunk has 16 tokens at first, so that text appears soon, and then four times as many each
    time, up to 1,024.

    Yields:
      The ids of a chunk, int32 [batch, n], where texts that have ended are padded with id 0.

    Raises:
      UserError: if a control is outside its range.
      NotFiniteError: if the model's logits are not finite.
    """
    prepared, control_arrays = prepare_params(model, params), make_control_arrays(controls)
    state = read_tokens(model, prepared, initial_state(model, prepared, len(prompts)), prompts)
    if num_samples > 1:  # The prompt is read once for all.
        state = jax.tree.map(lambda x: jnp.repeat(x, num_samples, 0) if x.ndim else x, state)
    stop, size = np.int32(-1 if stop_id is None else stop_id), 16
    while length > 0:
        if not np.isfinite(state.logits).all():
            raise NotFiniteError(
                "the model's predictions are not finite: training has diverged; train again with a "
                "lower --config.optimizer.learning_rate"
            )
        count = np.int32(min(size, length))
        ids, number, state = _generate(model, prepared, state, key, control_arrays, stop, count)
        yield np.array(ids)[:, : int(number)]
        if np.array(state.ended).all():
            return
        length -= int(number)
        size = min(4 * size, _CHUNK)


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> Int[np.ndarray, " n"]:
    """Return the ids of a prompt.

    For a model of documents, the prompt begins one, after a stop token. For another model, a
    prompt without tokens becomes one that can precede a text: a line break, or else the first token
    of the vocabulary.
    """
    if vocabulary.stop_id is not None:
        return np.array([vocabulary.stop_id, *vocabulary.encode(prompt)], np.int32)
    if len(ids := vocabulary.encode(prompt)):
        return ids
    start = vocabulary.encode("\n")
    return start if start[0] not in SPECIAL_IDS else np.array([len(SPECIAL_IDS)], np.int32)


def stream_texts(
    model: LanguageModel,
    params: Params,
    vocabulary: Vocabulary,
    key: Array,
    *,
    prompt: str = "",
    length: int,
    controls: Controls = DEFAULT_CONTROLS,
    num_samples: int = 1,
    stop_token: bool = True,
) -> Iterator[list[str]]:
    """Generate different continuations of a prompt, of up to `length` tokens, piece by piece.

    A text ends before the stop token, unless `stop_token` is false.

    Yields:
      The next piece of each text, of more and more tokens. The last may be empty. No other piece
      ends within a character.

    Raises:
      UserError: if a control is outside its range.
    """
    stop_id = vocabulary.stop_id if stop_token else None
    decoders = [vocabulary.make_decoder() for _ in range(num_samples)]
    for piece in generate_chunks(
        *(model, params, encode_prompt(vocabulary, prompt)[None], key, controls),
        length=length,
        stop_id=stop_id,
        num_samples=num_samples,
    ):
        rows = [[i for i in row if i != stop_id] for row in piece]
        yield [decode(row, False) for decode, row in zip(decoders, rows, strict=True)]
    yield [decode((), True) for decode in decoders]
