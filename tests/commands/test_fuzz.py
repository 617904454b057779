"""Test random input: it is accepted, or raises a `UserError` of one line."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lstm_jax import config as config_lib
from lstm_jax import generation
from lstm_jax.errors import UserError
from lstm_jax.run import command
from lstm_jax.vocabulary import Vocabulary

pytestmark = pytest.mark.drawn


def assert_one_line(error: UserError) -> None:
    """Assert that a command prints the error as one line."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit):
        command._fail(str(error))
    assert len(stderr.getvalue().splitlines()) == 1


FIELDS = [*config_lib.FIELDS]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.floats() | st.text(max_size=3), max_size=4),
    st.tuples(st.floats(), st.floats(), st.floats()),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
NAMES = st.one_of(st.sampled_from(FIELDS), st.text(max_size=12), st.sampled_from(["model", ""]))


@given(fields=st.dictionaries(NAMES, VALUES, max_size=4))
def test_config_fields(fields: dict[str, Any]) -> None:
    try:
        config = config_lib.complete_config({}, fields)
    except UserError as error:
        assert_one_line(error)
    else:
        assert config_lib.complete_config(json.loads(json.dumps(config.to_dict()))) == config


@given(prompt=st.text(st.characters(codec=None), max_size=50))
def test_prompts(prompt: str) -> None:
    for text in ("ab", "\n", "The quick brown fox.\n"):
        vocabulary = Vocabulary.from_text(text)
        ids = generation.encode_prompt(vocabulary, prompt)
        assert ids.dtype == np.int32 and len(ids) == max(len(prompt), 1)
        assert ids.min() > 0 and ids.max() < len(vocabulary)
        unknown = ", ".join(map(repr, sorted(set(prompt) - set(text))[:10]))
        assert vocabulary.name_unknown(prompt).removesuffix(", ...") == unknown
