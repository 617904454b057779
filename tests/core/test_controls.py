"""Compare the sampling controls with NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax.errors import UserError
from lstm_jax.generation import Controls, adjust_logits, make_control_arrays

adjusted = jax.jit(adjust_logits)


def compute_reference(logits: np.ndarray, controls: Controls) -> np.ndarray:
    """Return the probabilities for one text, computed by sorting, in float64."""
    logits = logits.astype(np.float64).copy()
    logits[:2] = -np.inf
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
    "none": Controls(),
    "temperature": Controls(temperature=0.5),
    "greedy": Controls(temperature=0, top_k=3, top_p=0.5),
    "top_k": Controls(top_k=3),
    "one": Controls(top_k=1),
    "top_p": Controls(top_p=0.7),
    "small top_p": Controls(top_p=1e-6),
    "large top_p": Controls(top_p=0.99),
    "min_p": Controls(min_p=0.3),
    "min_p 1": Controls(min_p=1.0),
    "all": Controls(0.7, 9, 0.9, 0.05),
    "all, wilder": Controls(1.7, 40, 0.95, 0.02),
}


@pytest.mark.parametrize("controls", ALL.values(), ids=ALL)
@pytest.mark.parametrize("size", [13, 3000])
def test_distributions_match_a_sort_based_reference(controls: Controls, size: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 3, (8, size)).astype(np.float32)
    result = adjusted(logits, make_control_arrays(controls))
    for row, of_text in zip(jax.nn.softmax(result), logits, strict=True):
        expected = compute_reference(of_text, controls)
        np.testing.assert_array_equal(row > 0, expected > 0)
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_tied_tokens_are_kept_together() -> None:
    logits = jnp.array([[9.0, 9.0, 2.0, 1.0, 1.0, 1.0, 0.0]])
    for controls in (Controls(top_k=2), Controls(top_p=0.7)):
        mask = adjusted(logits, make_control_arrays(controls))[0] > -jnp.inf
        assert mask.tolist() == [False, False, True, True, True, True, False]
    greedy = adjusted(logits[:, ::-1], make_control_arrays(Controls(temperature=0)))[0] > -jnp.inf
    assert greedy.tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -0.1}, "is -0.1: it needs temperature == 0 or 1e-6 <= temperature <= 1e6"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be of type float"),
        ({"top_k": -1}, "top_k is -1: it needs 0 <= top_k < 2\\*\\*31"),
        ({"top_k": 1.5}, "top_k is 1.5: it must be of type int"),
        ({"top_k": True}, "top_k is True: it must be of type int"),
        ({"top_p": 0.0}, "top_p is 0.0: it needs 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
    ],
)
def test_an_error_names_a_control_out_of_range(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_control_arrays(Controls(**changed))
