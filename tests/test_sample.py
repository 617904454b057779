from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax import model as model_lib
from lstm_jax import sample
from lstm_jax.model import LanguageModel
from lstm_jax.vocabulary import Vocabulary

MODEL = LanguageModel(9, 6, 12, 2)
# Scaled up, so that the distributions are far from uniform.
PARAMS = jax.tree.map(lambda x: 4 * x, model_lib.init(MODEL, jax.random.key(0)))


def test_greedy_is_the_argmax_of_one_long_pass() -> None:
    prompts = np.array([[2, 3, 4], [8, 2, 2]], np.int32)
    written = sample.generate(MODEL, PARAMS, prompts, jax.random.key(0), 0.0, 30)
    whole = jnp.concatenate([prompts, written], axis=1)
    logits, _ = model_lib.apply(MODEL, PARAMS, whole, MODEL.initial_carry(2))
    likeliest = jnp.argmax(logits.at[..., :2].set(-jnp.inf), axis=-1)
    np.testing.assert_array_equal(written, likeliest[:, 2:-1])


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    prompt = np.array([[2, 3, 4]], np.int32)
    logits, _ = model_lib.apply(MODEL, PARAMS, prompt, MODEL.initial_carry(1))
    for temperature in (0.5, 1.0, 2.0):
        scaled = np.asarray(logits[0, -1, 2:], np.float64) / temperature
        expected = np.exp(scaled) / np.exp(scaled).sum()
        draws = 20_000
        prompts = np.tile(prompt, (draws, 1))
        ids = sample.generate(MODEL, PARAMS, prompts, jax.random.key(1), temperature, 1)
        counts = np.bincount(np.asarray(ids)[:, 0], minlength=9)
        assert not counts[:2].any(), "special units are never drawn"
        # Chi-squared with 6 degrees of freedom exceeds 27.9 once in ten thousand times.
        assert ((counts[2:] - draws * expected) ** 2 / (draws * expected)).sum() < 27.9


def test_a_member_does_not_depend_on_the_size_of_the_batch() -> None:
    vocabulary = Vocabulary.from_text("abcdefg")
    options = {"prompt": "abc", "length": 20, "temperature": 1.0}
    key = jax.random.key(0)
    three = sample.write(MODEL, PARAMS, vocabulary, key, num_samples=3, **options)  # type: ignore[arg-type]
    one = sample.write(MODEL, PARAMS, vocabulary, key, **options)  # type: ignore[arg-type]
    assert one == three[:1]
    assert max(Counter(three).values()) == 1, "all different"
    assert all(len(text) == 23 and text.startswith("abc") for text in three)


def test_an_empty_prompt_starts_after_a_line_break() -> None:
    assert sample.encode_prompt(Vocabulary.from_text("ab\n"), "").tolist() == [2]
    assert sample.encode_prompt(Vocabulary.from_text("ab"), "").tolist() == [2]
    assert sample.encode_prompt(Vocabulary.from_text("ab"), "b?").tolist() == [3, 1]


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_bfloat16_model_writes(num_samples: int) -> None:
    model = LanguageModel(9, 6, 12, 2, dtype="bfloat16")
    prompts = np.full((num_samples, 3), 4, np.int32)
    ids = sample.generate(model, PARAMS, prompts, jax.random.key(0), 0.0, 5)
    assert ids.shape == (num_samples, 5)
