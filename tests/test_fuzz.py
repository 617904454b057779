"""Test random input: it is accepted, or raises a `UserError` of one line."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import commands
import draws
from lstm_jax import batches, generation, training
from lstm_jax import config as config_lib
from lstm_jax.data import files, texts
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, command, metrics, workdir
from lstm_jax.vocabulary import Vocabulary

pytestmark = pytest.mark.drawn

QUICK = str(Path(__file__).parents[1] / "experiments" / "quick.py")

settings.register_profile(
    "lstm_jax",
    max_examples=60 * draws.TIMES,
    deadline=None,
    derandomize=draws.TIMES == 1,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("lstm_jax")


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


FIELDS = [field for field, _ in config_lib.flatten(config_lib.default())]
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


def nest_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return {"a.b": 1} as {"a": {"b": 1}}; a field in a value that is not a dict is dropped."""
    tree: dict[str, Any] = {}
    for name, value in fields.items():
        *parents, last = name.split(".")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                break
        else:
            at[last] = value
    return tree


@given(fields=st.dictionaries(NAMES, VALUES, max_size=4))
def test_config_fields(fields: dict[str, Any]) -> None:
    try:
        config = config_lib.complete_config(nest_fields(fields))
    except UserError as error:
        assert_one_line(error)
    else:
        assert config_lib.complete_config(json.loads(json.dumps(config.to_dict()))) == config


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("saved")
    iterator, _ = batches.make_batches(np.zeros(10_000, np.int32), config_lib.default().batches, 0)
    with checkpoints.CheckpointWriter(directory) as writer:
        for step in (1, 2):
            params = {"w": jnp.full(3, float(step))}
            state = {"count": jnp.int32(step)}
            writer.save(step, params, state, iterator, {"metrics.jsonl": step})
            writer.record_validation(step, 1 / step)
    return directory


EDITS = st.lists(
    st.tuples(
        st.integers(0, 1000),  # The index of the file.
        st.sampled_from(["flip", "cut", "grow", "delete", "replace", "directory"]),
        st.integers(0, 100_000),  # The position in the file.
        st.binary(min_size=1, max_size=20),
    ),
    min_size=1,
    max_size=3,
)


def edit_files(paths: list[Path], edits: list[tuple[int, str, int, bytes]]) -> None:
    for number, kind, at, new in edits:
        path = paths[number % len(paths)]
        if not path.is_file():
            continue
        content = bytearray(path.read_bytes())
        if kind == "flip" and content:
            content[at % len(content)] ^= new[0]
        elif kind == "cut":
            del content[at % (len(content) + 1) :]
        elif kind == "grow":
            content += new
        elif kind == "replace":
            content = bytearray(new)
        path.unlink()
        if kind == "directory":
            path.mkdir()
        elif kind != "delete":
            path.write_bytes(content)


@pytest.mark.slow
@given(edits=EDITS)
def test_checkpoint_directories(
    edits: list[tuple[int, str, int, bytes]], saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    shutil.copytree(saved, directory)
    edit_files(sorted(path for path in directory.rglob("*") if path.is_file()), edits)
    iterator, _ = batches.make_batches(np.zeros(10_000, np.int32), config_lib.default().batches, 0)
    params, state = {"w": jnp.zeros(3)}, {"count": jnp.int32(0)}
    try:
        read, step = checkpoints.restore_best_params(directory, params)
        np.testing.assert_array_equal(read["w"], np.full(3, float(step)))
    except UserError as error:
        assert_one_line(error)
    try:
        restored = checkpoints.restore_latest(directory, params, state, iterator)
        assert restored is not None and restored.history == {"metrics.jsonl": restored.step}
        assert float(restored.params["w"][0]) == int(restored.state["count"]) == restored.step
    except UserError as error:
        assert_one_line(error)
    shutil.rmtree(directory)


@given(edits=EDITS, fields=st.none() | st.dictionaries(NAMES, VALUES, max_size=3))
def test_working_directories(
    edits: list[tuple[int, str, int, bytes]],
    fields: dict[str, Any] | None,
    trained: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    names = (workdir.CONFIG, workdir.VOCABULARY, workdir.METRICS)
    for name in names:
        shutil.copy(trained / name, directory)
    if fields is None:
        edit_files([directory / name for name in names], edits)
    else:  # Write a valid checksum.
        files.write_json(directory / workdir.CONFIG, nest_fields(fields))
        files.write_json(directory / workdir.VOCABULARY, {**fields, "units": list(fields.values())})
    for load in (workdir.load_config, workdir.load_vocabulary):
        try:
            loaded = load(directory)
            if fields is None:
                expected = load(trained)
                assert getattr(loaded, "tokens", loaded) == getattr(expected, "tokens", expected)
        except UserError as error:
            assert_one_line(error)
    path = directory / workdir.METRICS
    if not path.is_dir():
        metrics.read_metrics(path)
    shutil.rmtree(directory)
