"""Use the package from Python: `import lstm_jax`, trained models, and training."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import beam_search
import commands
import lstm_jax
import models
from lstm_jax import Run
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from models import make_run, predict_text

ROOT = Path(__file__).parents[2]


@pytest.mark.process
def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, lstm_jax; print('jax' in sys.modules, 'load' in dir(lstm_jax));"
        "print(lstm_jax.train, lstm_jax.config.default().num_epochs, lstm_jax.load.__module__);"
        "from lstm_jax import train; import lstm_jax.training;"
        "print(train is lstm_jax.training.train is lstm_jax.train)"
    )
    result = commands.run_python("-c", code)
    assert result.returncode == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert first == "False True" and second.startswith("<function train at ") and third == "True"
    assert second.endswith("20 lstm_jax.run.run")
    for name in lstm_jax.__all__:
        assert getattr(lstm_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lstm_jax.nothing  # type: ignore[attr-defined]


_UNCHANGED = """
import logging, os, signal, sys, warnings
# What these packages set when they are imported is not of this one.
import flax, jax, matplotlib.figure, optax, orbax.checkpoint, requests, tensorboardX, threadpoolctl
logging.getLogger("absl").setLevel("ERROR")  # Orbax warns if one of its threads is late.

def describe():
    loggers = [logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)]
    settings = {log.name: (log.level, log.filters[:], log.handlers[:]) for log in loggers}
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return {
        "logging": {name: values for name, values in settings.items() if any(values)},
        "sys": (sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook, signals),
        "environment": dict(os.environ),
        "JAX": dict(jax.config.values),
        "warnings": warnings.filters[:],
    }

before = describe()
import lstm_jax
config = lstm_jax.config.default()
config.data.path, directory = sys.argv[1:]
config.max_steps, config.model.hidden_size, config.batches.batch_size = 1, 8, 4
lstm_jax.train(config, directory, quiet=True)
lstm_jax.load(directory).generate("A", length=3)
after = describe()
assert before == after, [(before[key], after[key]) for key in before if before[key] != after[key]]
"""


@pytest.mark.process
def test_training_and_loading_leave_the_process_as_it_was(text_file: Path, tmp_path: Path) -> None:
    # Of the cache of all tests, another process may be writing an entry, of which JAX warns.
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    result = commands.run_python("-c", _UNCHANGED, text_file, tmp_path / "run", env=env)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_generated_text_is_that_of_the_command(trained: Path) -> None:
    options = ["--length=60", "--seed=3", "--top_k=8", "--prompt=The ", "--dtype=bfloat16"]
    output = commands.get_output("sample", f"--workdir={trained}", *options)
    run = lstm_jax.load(f"{trained}/../{trained.name}", dtype="bfloat16")
    assert run.generate("The ", length=60, seed=3, top_k=8) + "\n" == output
    assert "The " + "".join(run.stream("The ", length=60, seed=3, top_k=8)) + "\n" == output


def test_a_model_is_loaded_in_another_dtype(run: Run, trained: Path) -> None:
    assert run.model.dtype == "float32"
    rounded = lstm_jax.load(trained, dtype="bfloat16")
    scores = (loaded.score("The text").log_probs for loaded in (rounded, run))
    assert 0 < np.abs(np.subtract(*scores)).max() < 0.05


def test_several_texts_are_read_step_by_step() -> None:
    run, texts = make_run("abcdefgh"), ("abcd", "hgfe")
    ids = np.stack([run.vocabulary.encode(text) for text in texts])
    state = run.read(ids[:, :0])
    assert state.logits.shape == (2, len(run.vocabulary)) and not np.asarray(state.logits).any()
    for column in ids.T:
        state = run.read(column[:, None], state)
    np.testing.assert_array_equal(state.logits, run.read(ids).logits)
    log_probs = jax.nn.log_softmax(state.logits)
    for of_text, text in zip(log_probs, texts, strict=True):
        np.testing.assert_allclose(of_text, predict_text(run, text)[-1], atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_scores_are_those_of_the_model_with_a_prompt_and_without(cell: str) -> None:
    run = make_run("abcdefgh", cell=cell, num_layers=2)
    text = "".join(np.random.default_rng(1).choice(list("abcdefgh"), 2500))
    expected = predict_text(run, text)[np.arange(2499), run.vocabulary.encode(text)[1:]]
    whole = run.score(text)
    assert whole.tokens == list(text[1:])
    np.testing.assert_allclose(whole.log_probs, expected, atol=1e-4)
    for end in (0, 1, 2, 1027, 2500):
        scores = run.score(text[end:], text[:end])
        assert scores.tokens == list(text[max(end, 1) :])
        np.testing.assert_allclose(scores.log_probs, expected[max(end - 1, 0) :], atol=1e-4)


def test_hidden_states_are_those_from_which_the_logits_follow() -> None:
    run = make_run("abcdefgh", num_layers=2)
    text = "hagfbceddd"
    first, last = run.hidden_states(text)
    assert first.shape == last.shape == (10, 7)
    dense = run.params["dense"]
    log_probs = jax.nn.log_softmax(last @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(log_probs, predict_text(run, text), atol=1e-5)
    ids = run.vocabulary.encode(text)[None]
    _, carry = models.apply(run.model, run.params, ids, run.model.initial_carry(1))
    np.testing.assert_allclose(first[-1], carry[0].hidden[0], atol=1e-5)
    # Those of a beginning do not depend on what follows.
    np.testing.assert_allclose(run.hidden_states(text[:3])[0], first[:3], atol=1e-6)


def test_the_next_tokens_are_sorted_by_probability(run: Run) -> None:
    pairs = run.next("The", n=7)
    expected = np.exp(predict_text(run, "The")[-1])
    best = np.argsort(-expected)[:7]
    assert [token for token, _ in pairs] == [run.vocabulary.tokens[i] for i in best]
    np.testing.assert_allclose([p for _, p in pairs], expected[best], rtol=1e-4)


def test_a_beam_search_of_all_texts_finds_the_most_probable() -> None:
    run = make_run("abc")
    totals = {}
    for letters in itertools.product("abc", repeat=3):
        text = "b" + "".join(letters)
        log_probs = predict_text(run, text)[np.arange(3), run.vocabulary.encode(text)[1:]]
        totals[text] = log_probs.sum()
    ordered = sorted(totals, key=totals.__getitem__, reverse=True)
    results = beam_search.search(run, "b", length=3, beams=9)
    assert [text for text, _ in results[:9]] == ordered[:9]
    for text, total in results:
        assert total == pytest.approx(totals[text], abs=1e-4)
    # One beam is greedy decoding.
    ((greedy, _),) = beam_search.search(run, "b", length=30, beams=1)
    assert greedy == run.generate("b", length=30, temperature=0)


@pytest.mark.slow
def test_training_in_a_thread_is_silent_while_others_print(
    tiny_config: ConfigDict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_config.max_steps = 2
    rows: list[Any] = []
    printed = threading.Event()

    def watch(row: Any) -> None:
        rows.append(row)
        printed.wait(60)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lstm_jax.train, tiny_config, str(tmp_path / "run"), watch, quiet=True)
        commands.wait_until(lambda: rows or future.done())
        print("from the main thread")
        printed.set()
    trained, loaded = future.result(), lstm_jax.load(tmp_path / "run")
    assert trained.step == 2
    assert capfd.readouterr() == ("from the main thread\n", "")
    assert rows[-1]["split"] == "test"
    samples = [row["sample"] for row in rows if row["split"] == "validation"]
    assert len(samples) == 2
    assert all(sample in (tmp_path / "run" / workdir.SAMPLES).read_text() for sample in samples)
    rows = [{k: v for k, v in row.items() if k != "sample"} for row in rows]
    assert rows == trained.metrics == loaded.metrics
    assert trained.generate("A", length=9) == loaded.generate("A", length=9)
    with pytest.raises(UserError, match="num_epochs"):
        lstm_jax.train(ConfigDict({"num_epochs": -1}), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_pieces_grow_and_none_is_empty() -> None:
    assert [len(piece) for piece in make_run("abcdefgh").stream(length=100)] == [16, 64, 20]
    assert all(make_run("abcdefgh", stop=".").stream(length=500))


def test_an_error_names_the_argument() -> None:
    run = make_run("abc")
    calls: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (run.generate, {"length": -1}, "length is -1: it needs 1 <= length <= "),
        (run.generate, {"length": 1.0}, "length is 1.0: it must be of type int"),
        (run.stream, {"seed": 2**32}, "seed is 4294967296: it needs 0 <= seed < "),  # At once.
        (run.stream, {"top_k": 1.5}, "top_k is 1.5"),
        (run.next, {"text": "a", "n": -1}, "n is -1: it needs n >= 1"),
        (run.read, {"ids": np.array([[2, 999]])}, r"ids must be \[batch, time\], from 0 to 4"),
        (run.read, {"ids": np.array([2, 3])}, r"ids must be \[batch, time\], from 0 to 4"),
        (lstm_jax.load, {"directory": "nothing"}, "name the directory of a training run"),
        (lstm_jax.load, {"directory": "x", "cell": "Cell"}, "'Cell' is not FILE.py:CLASS"),
        (lstm_jax.load, {"directory": "tiny-shakespeare", "dtype": "half"}, "dtype is 'half'"),
        (run.vocabulary.decode, {"ids": [-1]}, "ids must be from 0 to"),
    ]
    for call, arguments, message in calls:
        with pytest.raises(UserError, match=message):
            call(**arguments)


def test_the_text_is_the_same_where_64_bits_are_enabled() -> None:
    run = make_run("abc")
    expected = run.generate("a", length=20, top_p=0.9)
    with jax.enable_x64(True):
        assert run.generate("a", length=20, top_p=0.9) == expected


def test_a_warning_names_what_the_model_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("abc")
    for call in (run.generate, run.stream, run.next):
        call("¿")
        assert "warning: the model does not know '¿'" in capsys.readouterr().err
