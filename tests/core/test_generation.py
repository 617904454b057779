"""Test that samples follow the distribution of the model."""

from collections import Counter
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import generation, loss
from lstm_jax.generation import Controls, adjust_logits, make_control_arrays
from lstm_jax.model import LanguageModel
from lstm_jax.vocabulary import Vocabulary

MODEL = LanguageModel(9, 6, 12, 2)
# Large weights make the distributions far from uniform.
PARAMS = models.draw_params(MODEL, 0.5)
ARRAYS = generation.prepare_params(MODEL, PARAMS)
VOCABULARY = Vocabulary.from_text("abcdef\n", stop="\n")
PROMPT = np.array([[2, 3, 4]], np.int32)
GREEDY = Controls(temperature=0)


def compute_logits(ids: np.ndarray) -> np.ndarray:
    """Return the logits [batch, time, vocabulary] after each of the ids [batch, time]."""
    logits, _ = models.apply(MODEL, PARAMS, ids, MODEL.initial_carry(len(ids)))
    return np.array(logits)


def test_greedy_decoding_is_the_argmax_of_a_single_pass() -> None:
    prompts = np.array([[2, 3, 4], [8, 2, 2]], np.int32)
    generated = models.generate_tokens(MODEL, PARAMS, prompts, jax.random.key(0), GREEDY, length=30)
    none = models.generate_tokens(MODEL, PARAMS, prompts, jax.random.key(0), length=0)
    assert none.shape == (2, 0)
    logits = compute_logits(np.concatenate([prompts, generated], axis=1))
    logits[..., :2] = -np.inf
    np.testing.assert_array_equal(generated, logits.argmax(axis=-1)[:, 2:-1])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 1000])
def test_a_prompt_of_any_length_gives_the_logits_of_a_single_pass(length: int) -> None:
    ids = np.random.default_rng(length).integers(2, 9, (2, length)).astype(np.int32)
    state = generation.read_tokens(MODEL, ARRAYS, generation.initial_state(MODEL, ARRAYS, 2), ids)
    np.testing.assert_allclose(state.logits, compute_logits(ids)[:, -1], rtol=1e-4, atol=1e-4)
    # Reading in two parts gives the same.
    halfway = generation.read_tokens(
        MODEL, ARRAYS, generation.initial_state(MODEL, ARRAYS, 2), ids[:, :1]
    )
    if length > 1:
        again = generation.read_tokens(MODEL, ARRAYS, halfway, ids[:, 1:])
        np.testing.assert_allclose(again.logits, state.logits, rtol=1e-4, atol=1e-4)
        assert again.position == state.position == length


@pytest.mark.parametrize("controls", [Controls(), Controls(1.5, 6, 0.95, 0.02)])
def test_samples_follow_the_exact_distribution(controls: Controls) -> None:
    draws = 6000
    prompts = np.tile(PROMPT, (draws, 1))
    ids = models.generate_tokens(MODEL, PARAMS, prompts, jax.random.key(1), controls, length=2)
    arrays, logits = make_control_arrays(controls), jnp.asarray(compute_logits(PROMPT)[:, -1])
    assert_distribution(ids[:, 0], adjust_logits(logits, arrays)[0])
    # The model then reads the sample: check the second one after the most frequent first one.
    first = np.bincount(ids[:, 0]).argmax()
    after = np.concatenate([PROMPT, [[first]]], axis=1).astype(np.int32)
    logits = jnp.asarray(compute_logits(after)[:, -1])
    assert_distribution(ids[ids[:, 0] == first, 1], adjust_logits(logits, arrays)[0])


def assert_distribution(ids: np.ndarray, logits: jax.Array) -> None:
    """Assert that samples follow softmax(logits), with a chi-squared test."""
    expected = len(ids) * np.asarray(jax.nn.softmax(logits), np.float64)
    counts = np.bincount(ids, minlength=9)
    possible = expected > 0
    assert not counts[~possible].any() and not counts[:2].any()
    # With 6 degrees of freedom, it exceeds 27.9 with probability 1e-4; with fewer, less often.
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 27.9


def test_a_stopped_text_stays_stopped_and_a_batch_ends_with_its_last_text() -> None:
    prompts = np.tile(PROMPT, (16, 1))
    stop_id = VOCABULARY.stop_id
    key = jax.random.key(3)
    ids = models.generate_tokens(MODEL, PARAMS, prompts, key, length=5000, stop_id=stop_id)
    on = models.generate_tokens(MODEL, PARAMS, prompts, key, length=ids.shape[1])
    ends = (ids == stop_id).argmax(axis=1)
    assert len(set(ends)) > 3 and ids.shape[1] == ends.max() + 1 < 5000
    for row, whole, end in zip(ids, on, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], whole[: end + 1])
        assert not row[end + 1 :].any()


def generate(prompt: str = "", **options: Any) -> list[str]:
    """Return whole texts, with the prompt."""
    options = {"prompt": prompt, **options}
    pieces = generation.stream_texts(MODEL, PARAMS, VOCABULARY, jax.random.key(0), **options)
    return [prompt + "".join(text) for text in zip(*pieces, strict=True)]


def test_a_sample_does_not_depend_on_the_batch_size() -> None:
    options: Any = {"prompt": "abc", "length": 20, "stop_token": False}
    three = generate(num_samples=3, **options)
    assert generate(**options) == three[:1]
    assert max(Counter(three).values()) == 1, "all different"
    assert all(len(text) == 23 and text.startswith("abc") for text in three)


def test_pieces_join_to_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"prompt": "ab", "length": 300, "stop_token": False, "num_samples": 2}
    key = jax.random.key(0)
    pieces = list(generation.stream_texts(MODEL, PARAMS, VOCABULARY, key, **options))
    assert [len(piece[0]) for piece in pieces] == [16, 64, 220, 0]
    assert ["ab" + "".join(text) for text in zip(*pieces, strict=True)] == generate(**options)
    generate_some = mock.Mock(wraps=generation._generate)
    monkeypatch.setattr(generation, "_generate", generate_some)
    next(generation.stream_texts(MODEL, PARAMS, VOCABULARY, key, **options))
    *_, count = generate_some.call_args.args
    assert generate_some.call_count == 1 and count == 16, "no text is generated ahead"


def test_a_text_ends_at_the_stop_token() -> None:
    whole = generate(prompt="a", length=2000, stop_token=False)[0]
    assert "\n" in whole
    assert generate(prompt="a", length=2000) == [whole.partition("\n")[0]]


def test_no_piece_ends_within_a_character() -> None:
    model, vocabulary = LanguageModel(258, 4, 8), Vocabulary.from_text("", "bytes")
    params = models.draw_params(model)
    # Of a lead byte and a continuation byte, in any order.
    params["dense"]["bias"] = params["dense"]["bias"].at[vocabulary.encode("é")].add(1000)
    options: Any = {"length": 400}
    pieces = generation.stream_texts(model, params, vocabulary, jax.random.key(0), **options)
    text = "".join(piece for (piece,) in pieces)
    assert "é" in text and len(text.encode("utf-8", "surrogateescape")) == 400


def test_a_prompt_begins_a_text() -> None:
    assert generation.encode_prompt(Vocabulary.from_text("ab\n"), "").tolist() == [2]
    assert generation.encode_prompt(Vocabulary.from_text("ab"), "").tolist() == [2]
    assert generation.encode_prompt(Vocabulary.from_text("ab"), "b?").tolist() == [3, 1]
    assert len(generation.encode_prompt(Vocabulary.from_text("a b", "tokens"), " ")) == 1
    vocabulary = Vocabulary.from_text("a\nb\n\nc", "words", stop="\n\n")
    assert generation.encode_prompt(vocabulary, "").tolist() == [vocabulary.stop_id]
    ids = [vocabulary.stop_id, *vocabulary.encode("b")]
    assert generation.encode_prompt(vocabulary, "b").tolist() == ids
    assert len(generate(length=5, stop_token=False)[0]) == 5


@pytest.mark.parametrize("size", [130, 7552])
def test_a_token_of_probability_zero_is_never_sampled(size: int) -> None:
    # A parallel cumulative sum in float32 is not monotonic: it can increase at a token of
    # probability zero. Test the values of jax.random.uniform near all such increases.
    draw = np.random.default_rng(size)
    rows = draw.normal(0, 3, (3, size)).astype(np.float32)
    rows[draw.random(rows.shape) < 0.5] = -np.inf
    rows -= rows.max(axis=1, keepdims=True)
    cumulated = np.asarray(jnp.cumsum(jnp.exp(rows), axis=-1))
    numbers = [0.0, 1 - 2.0**-23]
    for row, sums in zip(rows, cumulated, strict=True):
        up = np.flatnonzero((np.diff(sums) > 0) & np.isneginf(row[1:])) + 1
        shares = np.concatenate([sums[up - 1], sums[up]]) / sums[-1]
        near = np.floor(shares * 2.0**23)[:, None] + np.arange(-2, 3)
        numbers += [*(near.ravel() / 2.0**23).tolist()]
    uniform = np.unique(np.clip(numbers, 0, 1 - 2.0**-23)).astype(np.float32)[:3000]
    for row in rows:
        tokens = np.asarray(
            generation.draw_tokens(
                jnp.broadcast_to(row, (len(uniform), size)), jnp.asarray(uniform)
            )
        )
        assert np.isfinite(row[tokens]).all()


def test_each_function_is_compiled_once() -> None:
    """Results of a jitted function stay on the device of the parameters of a loaded run."""
    model = LanguageModel(9, 7, 11)
    params = jax.device_put(models.draw_params(model), jax.devices()[0])
    functions: list[Any] = [loss.compute_chunk_losses, generation._read, generation._generate]
    before = [function._cache_size() for function in functions]
    for length in (1000, 3000, 5000):  # One chunk, and several.
        loss.compute_loss(model, params, np.arange(length) % 7 + 2)
    for controls, prompt_length, length, stop_id in (
        (Controls(), 3, 20, None),
        (Controls(0, 3, 0.5, 1), 16, 7, 2),
        (Controls(2.5, 0, 1.0, 0), 1, 3000, None),
    ):
        arguments = model, params, np.full((1, prompt_length), 3, np.int32), jax.random.key(length)
        models.generate_tokens(*arguments, controls, length=length, stop_id=stop_id)
    assert [function._cache_size() for function in functions] == [size + 1 for size in before]
