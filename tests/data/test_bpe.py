"""Byte-pair encoding: learn tokens, divide words, train on them, and read the run again."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import commands
import lstm_jax
import runs
from conftest import make_tiny_config
from lstm_jax import bpe, training
from lstm_jax import loss as loss_lib
from lstm_jax.convert import transfer
from lstm_jax.errors import UserError
from lstm_jax.export import page
from lstm_jax.run import workdir
from lstm_jax.vocabulary import FILE_END, Vocabulary


def test_the_most_frequent_pairs_are_merged_first() -> None:
    # The example of Sennrich et al. 2016.
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert bpe.learn_tokens(counts, 4, 1) == ["es", "est", "lo", "low"]
    assert "wid" not in bpe.learn_tokens(counts, 100, 4)
    split = bpe.make_splitter(["es", "est", "lo", "low"])
    assert split("lowest") == ("low", "est")
    assert split("désert\udcff") == ("d", "\udcc3", "\udca9", "s", "e", "r", "t", "\udcff")
    # Any pair that forms a token is merged to it.
    assert bpe.make_splitter(["bc", "abc", "ab"])("abc") == ("abc",)
    assert bpe.make_splitter(["ab", "bc", "abc"])("abc") == ("abc",)
    assert bpe.make_splitter(["a" * 10**6, "bc"])("abc") == ("a", "bc")  # At once.


def test_the_size_includes_all_tokens(text_file: Path) -> None:
    text = text_file.read_text()
    for stop in ("", "\n", "\n\n"):
        for size in (259, 300):
            vocabulary = Vocabulary.from_text(text, "bpe", stop=stop, size=size)
            assert len(vocabulary) == size and vocabulary.stop == stop
            assert not any(stop in token for token in vocabulary.tokens if stop and token != stop)
    assert len(Vocabulary.from_text("ab ab", "bpe")) == 258 + len(["ab", " ab"])


def test_another_text_has_the_same_tokens(text_file: Path) -> None:
    vocabulary = Vocabulary.from_text(text_file.read_text(), "bpe", size=600)
    other = Vocabulary.from_text(f"日本語 日本語{FILE_END}", "bpe", stop=FILE_END)
    assert "日本語" in other and "日本語" not in vocabulary
    assert vocabulary.extend(other).tokens == (*vocabulary.tokens, FILE_END)
    assert vocabulary.extend(vocabulary).tokens == vocabulary.tokens


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tiny_config.data.units = "bpe"
    message = r"data.units=bpe needs the package tokenizers: pip install tokenizers$"
    with pytest.raises(UserError, match=message):
        training.train(tiny_config, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [".lock"]
    with pytest.raises(UserError, match=message):
        Vocabulary([*Vocabulary.from_text("", "bpe").tokens, "ab"], "bpe").encode("abc")


@pytest.fixture(scope="module")
def bpe_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Return the working directory of a tiny run, trained further from another one."""
    directory = tmp_path_factory.mktemp("bpe")
    text = text_file.read_text().replace("Citizen", "Citoyén 市民 👩‍👩‍👧‍👦")
    (directory / "text.txt").write_text(text, encoding="utf-8")
    config = make_tiny_config(directory / "text.txt")
    config.data.units, config.data.vocabulary_size = "bpe", 400
    config.data.document_separator, config.max_steps = "blank_line", 20
    training.train(config, directory / "first")
    config.init_from, config.max_steps = str(directory / "first"), 1
    training.train(config, directory / "run")
    first, second = (workdir.load_vocabulary(directory / name) for name in ("first", "run"))
    assert first.to_fields() == second.to_fields()
    return directory / "run"


@pytest.mark.slow
def test_a_run_generates_and_scores(bpe_run: Path) -> None:
    run = lstm_jax.load(bpe_run)
    assert len(run.vocabulary) == 400 and run.vocabulary.stop == "\n\n"
    options: Any = {"length": 300, "temperature": 1.5, "stop_token": False}
    pieces = list(run.stream("市", **options))
    text = "".join(pieces)
    assert len(pieces) > 2 and run.generate("市", **options) == "市" + text
    # A byte that is no part of a character is a surrogate; no other character is divided.
    assert text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    text = "Speak, citoyén!\n\nNaïve ≠"
    scores = run.score(text)
    assert "".join(run.vocabulary.split(text)).endswith("".join(scores.tokens))
    loss = loss_lib.compute_loss(run.model, run.params, run.vocabulary.encode(text))
    assert -scores.log_probs.mean() == pytest.approx(loss, rel=1e-5)
    assert run.score("oyén", "Speak, cit").tokens == run.vocabulary.split("oyén")


@pytest.mark.slow
def test_commands_read_a_run(bpe_run: Path, tmp_path: Path) -> None:
    evaluated = json.loads(commands.run("evaluate", "--workdir", bpe_run).stdout)
    assert 0 < evaluated["bits_per_character"] < evaluated["bits_per_token"]
    # Both restart the carry at each document.
    ((*_, loss),) = [row for row in runs.read_losses(bpe_run) if row[1] == "test"]
    assert evaluated["loss"] == pytest.approx(loss, rel=1e-5)
    target = tmp_path / "model.safetensors"
    transfer.export_weights(bpe_run, target)
    tokens = f"{target}.vocabulary.json"
    transfer.import_weights(target, tmp_path / "again", tokens)
    ours, theirs = (lstm_jax.load(path) for path in (bpe_run, tmp_path / "again"))
    assert ours.vocabulary.to_fields() == theirs.vocabulary.to_fields()
    page.write_page(bpe_run, "First Citizen: Zoë", tmp_path / "page.html")
