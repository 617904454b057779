"""Test random input: it is accepted, or raises a `UserError` of one line."""

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lstm_jax import config as config_lib
from lstm_jax.errors import UserError
from lstm_jax.run import command

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
