"""Test random input: it is accepted, or raises a `UserError` of one line."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import commands
from lstm_jax import batches, generation, training
from lstm_jax import config as config_lib
from lstm_jax.data import texts
from lstm_jax.errors import UserError
from lstm_jax.run import command, workdir
from lstm_jax.vocabulary import Vocabulary

pytestmark = pytest.mark.drawn

QUICK = str(Path(__file__).parents[2] / "experiments" / "quick.py")


def assert_one_line(error: UserError) -> None:
    """Assert that a command prints the error as one line."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit):
        command._fail(str(error))
    assert len(stderr.getvalue().splitlines()) == 1


CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text("ab\n\0\ufeff\r\u2028é", max_size=60).map(str.encode),
    st.tuples(st.text(min_size=1, max_size=3), st.integers(0, 3000)).map(
        lambda pair: (pair[0] * pair[1]).encode("utf-8", "surrogatepass")
    ),
)


@pytest.mark.slow
@given(
    contents=st.lists(CONTENTS, min_size=1, max_size=3),
    kind=st.sampled_from(["windows", "streams"]),
    batch_size=st.integers(1, 5),
    window_length=st.integers(1, 9),
    fractions=st.sampled_from([(0.9, 0.05, 0.05), (0.4, 0.3, 0.3), (1e-9, 0.5, 0.499999999)]),
)
def test_text_files(
    contents: list[bytes],
    kind: str,
    batch_size: int,
    window_length: int,
    fractions: tuple[float, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("text")
    for number, content in enumerate(contents):
        (directory / f"{number}.txt").write_bytes(content)
    config = config_lib.complete_config(
        {
            "data": {"path": f"{directory}/*.txt", "fractions": fractions},
            "batches": {"kind": kind, "batch_size": batch_size, "window_length": window_length},
        }
    )
    try:
        splits = texts.read_splits(config.data)
        vocabulary = Vocabulary.from_text(splits["train"])
        ids = vocabulary.encode(splits["train"])
        assert vocabulary.decode(ids) == splits["train"]
        vocabulary.encode(splits["test"])
        workdir.save_vocabulary(directory, vocabulary)
        read = workdir.load_vocabulary(directory)
        assert read.tokens == vocabulary.tokens
        iterator, _ = batches.make_batches(ids, config.batches, 0)
        batch = next(iterator)
        assert batch.inputs.shape == batch.targets.shape == (batch_size, window_length)
    except UserError as error:
        assert_one_line(error)
    finally:
        shutil.rmtree(directory)


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


@pytest.mark.slow
@given(
    name=st.sampled_from(FIELDS) | st.text("abcdefgh._", max_size=12),
    value=st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.text(max_size=12).filter(lambda text: "\0" not in text),
        st.sampled_from(["", "1,2", "(1,", "[]", "None", "True", "1e400", "0x10", "'", "{}"]),
    ),
)
def test_command_line_overrides(name: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", lambda *arguments: 0)
        done = commands.run("main", "--config", QUICK, f"--config.{name}={value}")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert (done.returncode, len(lines)) in ((0, 0), (2, 1))


@given(prompt=st.text(st.characters(codec=None), max_size=50))
def test_prompts(prompt: str) -> None:
    for text in ("ab", "\n", "The quick brown fox.\n"):
        vocabulary = Vocabulary.from_text(text)
        ids = generation.encode_prompt(vocabulary, prompt)
        assert ids.dtype == np.int32 and len(ids) == max(len(prompt), 1)
        assert ids.min() > 0 and ids.max() < len(vocabulary)
        unknown = ", ".join(map(repr, sorted(set(prompt) - set(text))[:10]))
        assert vocabulary.name_unknown(prompt).removesuffix(", ...") == unknown
