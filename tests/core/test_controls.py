"""Compare the sampling controls with NumPy."""

import contextlib
import re
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax.controls import (
    _NUMBERS,
    Controls,
    Stops,
    StopSearch,
    adjust_logits,
    check_number,
    make_control_arrays,
    make_stops,
)
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import KINDS, Vocabulary

adjusted = jax.jit(adjust_logits)


def compute_reference(logits: np.ndarray, age: np.ndarray, controls: Controls) -> np.ndarray:
    """Return the probabilities for one text, computed by sorting, in float64."""
    logits = logits.astype(np.float64).copy()
    recent = age <= controls.repetition_window
    factor = np.where(logits > 0, 1 / controls.repetition_penalty, controls.repetition_penalty)
    logits = np.where(recent, logits * factor, logits)
    allowed = np.ones(len(logits), bool)
    allowed[[0, 1, *controls.forbidden]] = False
    logits[~allowed] = -np.inf
    if controls.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    probabilities = np.exp((logits - logits.max()) / controls.temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    if controls.top_k:
        probabilities[order[controls.top_k :]] = 0
        probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    if controls.top_p < 1:
        probabilities[order[before >= controls.top_p]] = 0
    probabilities[probabilities < controls.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


ALL = {
    "temperature": Controls(temperature=0.5),
    "greedy": Controls(temperature=0, top_k=3, top_p=0.5),
    "top_k": Controls(top_k=3),
    "one": Controls(top_k=1),
    "top_p": Controls(top_p=0.7),
    "small top_p": Controls(top_p=1e-6),
    "large top_p": Controls(top_p=0.999),
    "min_p": Controls(min_p=0.3),
    "min_p 1": Controls(min_p=1.0),
    "repetition_penalty": Controls(repetition_penalty=1.5, repetition_window=10),
    "repetition": Controls(repetition_penalty=0.5, repetition_window=3),
    "forbidden": Controls(forbidden=[4, 7]),
    "all": Controls(0.7, 9, 0.9, 0.05, 1.3, 10, [3]),
    "all, wilder": Controls(1.7, 40, 0.95, 0.02, 1.2, 20, [3, 5, 11]),
}


@pytest.mark.parametrize("controls", ALL.values(), ids=ALL)
@pytest.mark.parametrize("size", [13, 3000])
def test_distributions_match_a_sort_based_reference(controls: Controls, size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 3, (8, size)).astype(np.float32)
    age = rng.integers(1, 30, (8, size)).astype(np.int32)
    result = adjusted(logits, age, make_control_arrays(controls, size))
    for row, one_logits, one_age in zip(jax.nn.softmax(result), logits, age, strict=True):
        expected = compute_reference(one_logits, one_age, controls)
        np.testing.assert_array_equal(row > 0, expected > 0)
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_the_default_is_the_distribution_of_the_model() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (1, 13)).astype(np.float32)
    result = adjusted(logits, np.ones((1, 13), np.int32), make_control_arrays(Controls(), 13))
    expected = np.exp(logits[0, 2:]) / np.exp(logits[0, 2:]).sum()
    np.testing.assert_allclose(jax.nn.softmax(result)[0], [0, 0, *expected], rtol=1e-5)


def test_tied_tokens_are_kept_together() -> None:
    logits = jnp.array([[9.0, 9.0, 2.0, 1.0, 1.0, 1.0, 0.0]])
    age = jnp.full(logits.shape, 99)
    for controls in (Controls(top_k=2), Controls(top_p=0.7)):
        kept = adjusted(logits, age, make_control_arrays(controls, 7))[0] > -jnp.inf
        assert kept.tolist() == [False, False, True, True, True, True, False]
    greedy = (
        adjusted(logits[:, ::-1], age, make_control_arrays(Controls(temperature=0), 7))[0]
        > -jnp.inf
    )
    assert greedy.tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: it must be 0, or from 1e-6 to 1e6"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"repetition_penalty": 1e39}, r"repetition_penalty is 1e\+39"),
        ({"forbidden": 5}, "forbidden is 5: it must be a list of ids"),
        ({"forbidden": iter([2])}, "forbidden is <.*>: it must be a list of ids"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_window": -1}, "repetition_window is -1"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 1.5}, "top_k is 1.5: it must be a whole number"),
        ({"top_k": True}, "top_k is True: it must be a whole number"),
        ({"forbidden": [-1]}, "forbidden has -1: it must be a list of ids of tokens, from 0 to 4"),
        ({"forbidden": [2, 5]}, "forbidden has 5"),
        ({"forbidden": "a"}, "forbidden has 'a'"),
        ({"forbidden": [2, 3, 4]}, "every token of the vocabulary is forbidden"),
    ],
)
def test_an_error_names_a_control_out_of_range(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_control_arrays(Controls(**changed), 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_ends_with_the_token_that_completes_the_stop_text(kind: str) -> None:
    text = "aab aabaabab ab a éb " + "ab " * 30 + "aabaaabaab a"
    vocabulary = Vocabulary.from_text(text, kind)
    tokens, ids = vocabulary.split(text), vocabulary.encode(text)
    generated = [token.encode("utf-8", "surrogateescape") for token in tokens]
    for stop_at in ("b", "ab", "aab", "abab", "aabaab", "é", "a é", "ab " * 20):
        wanted = stop_at.encode()
        expected = next(n for n in range(len(ids) + 1) if wanted in b"".join(generated[:n]))
        for chunk in (1, 2, 7, len(ids)):
            search, end = StopSearch(make_stops(vocabulary, stop_at=stop_at)), None
            for start in range(0, len(ids), chunk):
                if (end := search.find_end(ids[start : start + chunk])) is not None:
                    assert start + end == expected
                    break
            assert end is not None


def test_the_stop_token_can_be_off() -> None:
    vocabulary = Vocabulary.from_text("a b\n\nc", stop="\n\n")
    assert make_stops(vocabulary).token_id == vocabulary.stop_id
    assert make_stops(vocabulary, False) == Stops()


@pytest.mark.parametrize("name", [n for n, (kind, *_) in _NUMBERS.items() if kind is Integral])
def test_whole_numbers_have_the_limits_that_the_error_states(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is -1: it must be ") as raised:
        check_number(name, -1)
    words = str(raised.value).partition("must be ")[2].replace(",", "")
    low, *high = map(int, re.findall(r"\d+", words))
    for value, is_allowed in ((low, True), (low - 1, False), *((h, True) for h in high)):
        with contextlib.nullcontext() if is_allowed else pytest.raises(UserError):
            check_number(name, value)
    for above in high:
        with pytest.raises(UserError):
            check_number(name, above + 1)
