"""A prompt to text: a jitted loop reads the prompt, another draws tokens and reads each in turn."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstm_jax import model as model_lib
from lstm_jax.controls import (
    DEFAULT_CONTROLS,
    MIN_STATES,
    ControlArrays,
    Controls,
    adjust_logits,
    make_control_arrays,
    make_stop_table,
)
from lstm_jax.errors import NotFiniteError
from lstm_jax.vocabulary import PADDING_ID, SPECIAL_IDS, Vocabulary

# Tokens that one call of the compiled function writes: few at first, so that text is seen at once.
_FIRST_CHUNK, _CHUNK = 16, 1024
_LONG_AGO = -(2**30)

prepare_params = jax.jit(model_lib.prepare_step, static_argnames="model")


class State(NamedTuple):
    """Where a batch of texts stands: all that its continuation follows from, but for the controls.

    Attributes:
      logits: of the next token, float32 [batch, vocabulary].
      carry: the model's.
      last_seen: the position where each unit last stood, int32 [batch, vocabulary].
      position: tokens read and written so far, int32 [].
      progress: the states of the automaton that knows where the texts end, int32 [batch].
    """

    logits: jax.Array
    carry: model_lib.Carry
    last_seen: jax.Array
    position: jax.Array
    progress: jax.Array


def initial_state(model: model_lib.LanguageModel, batch_size: int = 1) -> State:
    """The state before anything was read. It predicts nothing yet."""
    shape = (batch_size, model.vocabulary_size)
    return State(
        jnp.zeros(shape),
        model.initial_carry(batch_size),
        jnp.full(shape, _LONG_AGO, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(batch_size, jnp.int32),
    )


def read_tokens(
    model: model_lib.LanguageModel,
    arrays: model_lib.StepArrays | model_lib.Params,
    state: State,
    ids: np.ndarray,
) -> State:
    """The state after reading ids, int32 [batch, time], of any length, with `prepare_params`d arrays.

    Lengths up to the same power of two share one compiled function.
    """
    time = ids.shape[1]
    padding = max(16, 1 << (time - 1).bit_length()) - time
    return _read(model, arrays, state, np.pad(ids, ((0, 0), (0, padding))), np.int32(time))


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    arrays: model_lib.StepArrays | model_lib.Params,
    state: State,
    ids: jax.Array,
    count: jax.Array,
) -> State:
    """Reads the first `count` of the ids [batch, time]."""
    return jax.lax.fori_loop(
        0, count, lambda t, state: _take(model, arrays, state, ids[:, t]), state
    )


def _take(
    model: model_lib.LanguageModel,
    arrays: model_lib.StepArrays | model_lib.Params,
    state: State,
    ids: jax.Array,
) -> State:
    """The state after one more token of each text, int32 [batch]."""
    logits, carry = model_lib.apply_step(model, arrays, ids, state.carry)
    last_seen = state.last_seen.at[jnp.arange(len(ids)), ids].set(state.position)
    return state._replace(
        logits=logits, carry=carry, last_seen=last_seen, position=state.position + 1
    )


@functools.partial(jax.jit, static_argnames="model")
def _write(
    model: model_lib.LanguageModel,
    arrays: model_lib.StepArrays | model_lib.Params,
    state: State,
    key: jax.Array,
    controls: ControlArrays,
    stops: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, State]:
    """Writes `count` tokens, or fewer where every text ends before.

    Returns:
      Ids [batch, _CHUNK], how many of them were written, and the state after them.
    """
    batch_size = len(state.logits)
    end = len(stops) - 1
    # Made here, all at once, they cost nearly nothing; on a CPU, random bits made in the loop cost
    # as much as half a step of a model of 1,024 units.
    uniform = random_numbers(key, batch_size, state.position + jnp.arange(_CHUNK))

    def going_on(loop: tuple[jax.Array, jax.Array, State]) -> jax.Array:
        _, written, state = loop
        return (written < count) & jnp.any(state.progress != end)

    def write_one(
        loop: tuple[jax.Array, jax.Array, State],
    ) -> tuple[jax.Array, jax.Array, State]:
        ids, written, state = loop
        logits = adjust_logits(state.logits, state.position - state.last_seen, controls)
        drawn = draw_tokens(logits, uniform[:, written])
        drawn = jnp.where(state.progress == end, PADDING_ID, drawn)
        state = _take(model, arrays, state, drawn)
        state = state._replace(progress=stops[state.progress, drawn])
        return ids.at[:, written].set(drawn), written + 1, state

    ids = jnp.full((batch_size, _CHUNK), PADDING_ID, jnp.int32)
    return jax.lax.while_loop(going_on, write_one, (ids, jnp.zeros((), jnp.int32), state))


def random_numbers(key: jax.Array, batch_size: int, positions: jax.Array) -> jax.Array:
    """The numbers in [0, 1) that decide the draws of `generate_tokens`, one for each.

    Args:
      key: PRNG key.
      batch_size: how many texts.
      positions: tokens before each draw, the prompt's included, int32 [n].

    Returns:
      Float32 [batch_size, n]. Each depends on key, text and position alone.
    """
    fold_in = jax.random.fold_in
    keys = jax.vmap(lambda b: jax.vmap(fold_in, (None, 0))(fold_in(key, b), positions))
    return jax.vmap(jax.vmap(jax.random.uniform))(keys(jnp.arange(batch_size)))


def draw_tokens(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """The units at which the cumulated probabilities pass numbers in [0, 1): int32 [batch].

    Args:
      logits: float32 [batch, vocabulary], the greatest of each text 0, minus infinity for what is
        never drawn.
      uniform: float32 [batch].
    """
    probabilities = jnp.exp(logits)
    # A parallel sum is not monotonic: it may pass a number where the probability is zero.
    cumulated = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0)
    passed = cumulated > uniform[:, None] * cumulated.max(axis=-1, keepdims=True)
    return jnp.argmax(passed, axis=-1).astype(jnp.int32)


def generate_chunks(
    model: model_lib.LanguageModel,
    arrays: model_lib.StepArrays | model_lib.Params,
    state: State,
    key: jax.Array,
    controls: ControlArrays,
    stops: np.ndarray,
    length: int,
) -> Iterator[tuple[np.ndarray, State]]:
    """Continues texts chunk by chunk, until all have ended or have `length` more tokens.

    What member b of the batch draws depends on `key`, b and its position in the text, not on the
    size of the batch or of the chunks.

    Args:
      model: the model.
      arrays: what `prepare_params` made of its parameters.
      state: where the texts stand.
      key: PRNG key.
      controls: see `Controls`; no value of theirs compiles anything anew.
      stops: where texts end, see `controls.stop_table`.
      length: tokens to write at most.

    Yields:
      The ids of each chunk, int32 [batch, n], with "" (id 0) for members that have ended, and the
      state after it.

    Raises:
      NotFiniteError: if the model's predictions are not finite.
    """
    state = state._replace(progress=jnp.zeros_like(state.progress))
    chunk = _FIRST_CHUNK
    while length > 0:
        if not np.isfinite(state.logits).all():
            raise NotFiniteError(
                "the model's predictions are not finite: its training has diverged, train it anew "
                "with a lower optimizer.learning_rate"
            )
        count = min(chunk, length)
        ids, written, state = _write(model, arrays, state, key, controls, stops, np.int32(count))
        if written:
            yield np.asarray(ids)[:, : int(written)], state
        if written < count:
            return
        length -= count
        chunk = min(4 * chunk, _CHUNK)


def generate_tokens(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    prompts: np.ndarray,
    key: jax.Array,
    controls: Controls = DEFAULT_CONTROLS,
    *,
    length: int,
    stops: np.ndarray | None = None,
) -> np.ndarray:
    """Continues each prompt with the model's own samples, one token at a time.

    What is compiled serves all controls, stops, lengths, and prompts up to the same power of two.

    Args:
      model: the model.
      params: its parameters.
      prompts: int32 [batch, time], time at least 1.
      key: PRNG key. What member b draws depends on it and on b, not on the size of the batch.
      controls: how tokens are drawn.
      length: how many tokens to write at most.
      stops: where texts end (`controls.stop_table`); None: nowhere before `length`.

    Returns:
      The tokens written, without the prompts: int32 [batch, n]. After its end a text is filled up
      with "" (id 0); n is `length` or, where every text ended before, the longest one's length.

    Raises:
      UserError: for a control outside its range.
    """
    control_arrays = make_control_arrays(controls, model.vocabulary_size)
    if stops is None:
        stops = np.zeros((MIN_STATES, model.vocabulary_size), np.int32)
    arrays = prepare_params(model, params)
    state = read_tokens(model, arrays, initial_state(model, len(prompts)), prompts)
    chunks = generate_chunks(model, arrays, state, key, control_arrays, stops, length)
    return np.concatenate([ids for ids, _ in chunks], axis=1)


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> np.ndarray:
    """The ids of a prompt, int32 [n].

    Of an empty one those of what a text starts after: the stop token, else a line break, else the
    first unit.
    """
    if prompt:
        return vocabulary.encode(prompt)
    if vocabulary.stop_id is not None:
        return np.array([vocabulary.stop_id], np.int32)
    start = vocabulary.encode("\n")
    return start if start[0] not in SPECIAL_IDS else np.array([len(SPECIAL_IDS)], np.int32)


def stream_texts(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    vocabulary: Vocabulary,
    key: jax.Array,
    *,
    prompt: str = "",
    length: int,
    controls: Controls = DEFAULT_CONTROLS,
    num_samples: int = 1,
    stop_token: bool = True,
    stop_at: str = "",
) -> Iterator[list[str]]:
    """Different continuations of a prompt, piece by piece as they are made.

    Args:
      model: the model.
      params: its parameters.
      vocabulary: what it was trained with.
      key: PRNG key.
      prompt: text to go on from.
      length: how many units to write at most.
      controls: how they are drawn.
      num_samples: how many texts.
      stop_token: whether a text ends at the stop token, which is then no part of it.
      stop_at: a text ends when this is written, too.

    Yields:
      The next piece of each text. No piece ends within a character.

    Raises:
      UserError: for a control outside its range.
    """
    control_arrays = make_control_arrays(controls, len(vocabulary))
    stops = make_stop_table(vocabulary, stop_token, stop_at)
    arrays = prepare_params(model, params)
    state = read_tokens(
        model, arrays, initial_state(model), encode_prompt(vocabulary, prompt)[None]
    )
    if num_samples > 1:  # Read once, written on many times.
        state = jax.tree.map(lambda x: jnp.repeat(x, num_samples, 0) if x.ndim else x, state)
    decoders = [text_decoder(vocabulary, stop_token) for _ in range(num_samples)]
    for ids, _ in generate_chunks(model, arrays, state, key, control_arrays, stops, length):
        yield [decode(row, False) for decode, row in zip(decoders, ids, strict=True)]
    yield [decode((), True) for decode in decoders]


def text_decoder(vocabulary: Vocabulary, stop_token: bool) -> Callable[[Iterable[int], bool], str]:
    """`Vocabulary.decoder`, for text that ends before the stop token if `stop_token` says so."""
    decode = vocabulary.decoder()
    silent = vocabulary.stop_id if stop_token else None
    return lambda ids, final: decode([i for i in ids if i != silent], final)


def generate_texts(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    vocabulary: Vocabulary,
    key: jax.Array,
    *,
    prompt: str = "",
    num_samples: int = 1,
    **options: Any,
) -> list[str]:
    """The whole texts, prompt included, of which `stream_texts` yields the pieces; it takes the same."""
    pieces = stream_texts(
        model, params, vocabulary, key, prompt=prompt, num_samples=num_samples, **options
    )
    return [prompt + "".join(text) for text in zip(*pieces, strict=True)]
