"""Convert weights of PyTorch, from stored files and with the library if it is installed."""

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import commands
import lstm_jax
import models
from lstm_jax import config, training
from lstm_jax import model as model_lib
from lstm_jax.convert import torch_weights, transfer
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.vocabulary import FILE_END, Vocabulary

pytest.importorskip("safetensors")

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXT = FIXTURES / "text.txt"
TOKENS = FIXTURES / "vocabulary.json"
STORED = {"torch_lstm.safetensors": ("lstm", 3), "torch_gru.safetensors": ("gru", 2)}
NAMES = ("embedding", "layers", "linear")  # Of the modules in these files.


def compute_logits(trained: lstm_jax.Run, text: str) -> np.ndarray:
    """Return the logits after each character, [time, vocabulary]."""
    ids = trained.vocabulary.encode(text)[None]
    carry = trained.model.initial_carry(1)
    return np.asarray(models.apply(trained.model, trained.params, ids, carry)[0][0])


def make_arrays(tokens: int = 30, **fields: Any) -> torch_weights.StateDict:
    """Return the random `state_dict` of a model with 6 features and 5 hidden units."""
    model = model_lib.LanguageModel(tokens, fields.pop("embedding_size", 6), 5, **fields)
    return torch_weights.from_model(model, models.draw_params(model, 1.0))


def save(arrays: torch_weights.StateDict, path: Path) -> Path:
    """Write a `state_dict` to a file."""
    path.write_bytes(torch_weights.to_bytes(arrays))
    return path


def write_vocabulary(path: Path, tokens: Sequence[str]) -> str:
    path.write_text(json.dumps({"kind": "characters", "stop": "", "units": [*tokens]}))
    return str(path)


def convert(arrays: torch_weights.StateDict, cell: str = "lstm") -> tuple[dict[str, Any], Any]:
    return torch_weights.to_model(arrays, ("embedding", cell, "linear"))


@pytest.mark.parametrize("name", STORED)
def test_an_imported_model_reproduces_the_logits_of_its_library(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    transfer.import_weights(FIXTURES / name, directory, str(TOKENS), NAMES)
    trained = lstm_jax.load(directory)
    assert (trained.model.cell, trained.model.num_layers, trained.step) == (*STORED[name], 0)
    with np.load(FIXTURES / "logits.npz") as expected:
        ours = compute_logits(trained, TEXT.read_text())[::10]
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no partial directory is left"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("tied", [False, True])
def test_exported_weights_are_read_back_unchanged(cell: str, tied: bool, tmp_path: Path) -> None:
    size = 5 if tied else 6
    model = model_lib.LanguageModel(30, size, 5, 11, cell=cell, tie_embeddings=tied)
    params = models.draw_params(model, 1.0)
    path = save(torch_weights.from_model(model, params), tmp_path / "model.safetensors")
    fields, again = convert(torch_weights.read_file(path), cell)
    sizes = {"embedding_size": size, "hidden_size": 5, "num_layers": 11}
    assert fields == {"cell": cell, **sizes, "tie_embeddings": tied}
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_a_run_survives_export_and_import(
    trained: Path, text_file: Path, tiny_config: Any, tmp_path: Path
) -> None:
    before = lstm_jax.load(trained)
    text = text_file.read_text(encoding="utf-8")[:300]
    target, directory = tmp_path / "model.safetensors", tmp_path / "again"
    transfer.export_weights(trained, target)
    transfer.import_weights(target, directory, f"{target}.vocabulary.json")
    result = commands.run("evaluate", f"--workdir={directory}")  # The text of the run is not known.
    assert result.returncode == 2 and "name one with --text" in result.stderr
    after = lstm_jax.load(directory)
    assert after.vocabulary.tokens == before.vocabulary.tokens
    ours, theirs = compute_logits(before, text), compute_logits(after, text)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    tiny_config.init_from, tiny_config.max_steps = str(directory), 1
    training.train(config.complete_config(tiny_config), tmp_path / "run")


@pytest.mark.parametrize("tokens", [["[UNK]", *"abcd"], [*"abcd"], ["", *"abcd"]])
def test_missing_special_tokens_are_added_and_never_predicted(
    tokens: list[str], tmp_path: Path
) -> None:
    arrays = make_arrays(len(tokens))
    model = save(arrays, tmp_path / "model.safetensors")
    vocabulary = write_vocabulary(tmp_path / "tokens.json", tokens)
    transfer.import_weights(model, tmp_path / "run", vocabulary)
    trained = lstm_jax.load(tmp_path / "run")
    assert trained.vocabulary.tokens == ("", "[UNK]", *"abcd")
    carry = trained.model.initial_carry(1)
    model_of_own = trained.model.clone(vocabulary_size=len(tokens))
    ids = np.array([[tokens.index(token) for token in "dbc"]])
    expected, _ = models.apply(model_of_own, convert(arrays)[1], ids, carry)
    ids = trained.vocabulary.encode("dbc")[None]
    logits, _ = models.apply(trained.model, trained.params, ids, carry)
    known = [trained.vocabulary.tokens.index(token) for token in tokens]
    np.testing.assert_allclose(logits[..., np.array(known)], expected, rtol=0, atol=1e-6)
    added = np.delete(logits, known, axis=-1)
    np.testing.assert_allclose(added, added * 0 + expected.mean(-1, keepdims=True) - 30, atol=1e-5)


@pytest.mark.parametrize(("separator", "stop"), [("blank_line", "\n\n"), ("file", FILE_END)])
def test_documents_keep_their_stop_token(separator: str, stop: str, tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_text(f"ab{stop}ba{stop}", stop=stop)
    model = save(make_arrays(tokens=len(vocabulary)), tmp_path / "model.safetensors")
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary.to_fields()))
    transfer.import_weights(model, tmp_path / "run", str(tmp_path / "vocabulary.json"))
    trained = lstm_jax.load(tmp_path / "run")
    assert trained.vocabulary.stop == stop
    assert trained.config.data.document_separator == separator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lstm.weight_ih_l0_reverse": (20, 6)},
            "reverse is of shape [20, 6], and must be missing",
        ),
        ({"lstm.weight_hh_l0": None}, "it has no matrices embedding.weight and lstm.weight_hh_l0"),
        (
            {"embedding.weight": None, "linear.weight": None},
            "it has no matrices embedding.weight and",
        ),
        ({"lstm.weight_ih_l0": None}, "lstm.weight_ih_l0 is missing, and must be of shape [20, 6]"),
        ({"lstm.weight_ih_l0": (20, 5)}, "is of shape [20, 5], and must be of shape [20, 6]"),
        ({"embedding.weight": (29, 6)}, "linear.bias is of shape [30], and must be of shape [29]"),
    ],
)
def test_an_error_names_an_array_that_does_not_fit(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    changed: Any = {name: shape and np.ones(shape) for name, shape in change.items()}
    arrays = {k: x for k, x in {**make_arrays(), **changed}.items() if x is not None}
    with pytest.raises(UserError) as error:
        convert(arrays)
    assert message in str(error.value) and "--modules" in str(error.value)


def test_numbers_that_are_not_finite_raise_an_error(tmp_path: Path) -> None:
    changed = {**make_arrays(), "linear.bias": np.full(30, np.nan, np.float32)}
    with pytest.raises(UserError, match="linear.bias has numbers that are not finite"):
        torch_weights.read_file(save(changed, tmp_path / "model.safetensors"))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_modules_with_other_names_without_biases_in_16_bits(dtype: Any, tmp_path: Path) -> None:
    own = make_arrays(num_layers=2, embedding_size=5)
    names = {"embedding": "encoder", "lstm": "rnn.layers", "linear": "decoder"}
    arrays = {
        re.sub(r"^\w+", lambda module: names[module[0]], name): array.astype(dtype)
        for name, array in own.items()
        if "bias" not in name
    }
    del arrays["encoder.weight"]  # Tied, and stored under one name only.
    read = torch_weights.read_file(save(arrays, tmp_path / "model.safetensors"))
    fields, params = torch_weights.to_model(read, list(names.values()))
    assert fields["tie_embeddings"] and fields["num_layers"] == 2
    assert params["embedding"]["embedding"].dtype == np.float32
    assert not params["dense"]["bias"].any() and not params["lstm_1"]["bias"].any()
    np.testing.assert_allclose(params["embedding"]["embedding"], own["linear.weight"], rtol=1e-2)
    kernel = own["lstm.weight_hh_l1"].T
    np.testing.assert_allclose(params["lstm_1"]["recurrent_kernel"], kernel, rtol=1e-2)


@pytest.mark.parametrize(
    "fields",
    [
        {"cell": "mogrifier"},
        {"block": "residual"},
        {"skip_connections": True},
        {"tie_embeddings": True, "num_layers": 2, "embedding_size": 7},
    ],
)
def test_layers_that_torch_lacks_raise_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="PyTorch has only the cells lstm and gru"):
        make_arrays(**fields)


def test_an_error_says_why_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note").write_text("of the user's")
    model, broken = FIXTURES / "torch_lstm.safetensors", tmp_path / "broken.safetensors"
    broken.write_bytes(model.read_bytes()[:900])
    words = write_vocabulary(tmp_path / "words.json", ["", "[UNK]", *"abcdefghijklm", "word"])
    (tmp_path / "deep.json").write_text("[" * 10**5)
    itos = {"kind": "characters", "stop": "", "units": {"0": "a", "1": "b"}}
    (tmp_path / "itos.json").write_text(json.dumps(itos))
    latin = {"kind": "bytes", "stop": "", "units": [*map(chr, range(256))]}
    (tmp_path / "bytes.json").write_text(json.dumps(latin))
    all_bytes = save(make_arrays(256), tmp_path / "bytes.safetensors")
    for arguments, message in (
        ((model, tmp_path / "run", str(TOKENS), NAMES), "can't write to .* not empty"),
        ((model, tmp_path / "new", words, NAMES), "the model has"),
        ((model, tmp_path / "new", str(tmp_path / "itos.json")), "is not a vocabulary.json"),
        ((model, tmp_path / "new", str(tmp_path / "deep.json")), "is not a vocabulary.json"),
        ((model, tmp_path / "new", "nothing.json"), "can't read nothing.json"),
        ((all_bytes, tmp_path / "new", str(tmp_path / "bytes.json")), "the vocabulary lacks bytes"),
        ((broken, tmp_path / "new", str(TOKENS)), r"not a safetensors file \(.*\): write one with"),
    ):
        with pytest.raises(UserError, match=message):
            transfer.import_weights(*arguments)
    shutil.copytree(trained, tmp_path / "own")
    own = {"model.cell": "my.py:Cell"}
    changed = config.complete_config(workdir.load_config(trained), own)
    workdir.save_fields(tmp_path / "own", changed, workdir.load_vocabulary(trained))
    for directory, target, message in (
        ("nothing", "new.safetensors", "there is no trained model in"),
        ("own", "new.safetensors", "can't be converted: its cell is in a file, my.py:Cell"),
        (trained, "broken.safetensors", "broken.safetensors exists"),
        (trained, "nothing/new.safetensors", "can't write"),
    ):
        with pytest.raises(UserError, match=message):
            transfer.export_weights(tmp_path / directory, tmp_path / target)
    with pytest.raises(UserError, match="itos.json exists: remove it, or use another --to"):
        transfer.export_folder(trained, tmp_path / "itos.json", "float32")
    names = {"run", "own", "broken.safetensors", "words.json", "itos.json"}
    names |= {"bytes.json", "bytes.safetensors", "deep.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_corrupted_weights_are_read_or_raise_a_one_line_error(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "model.safetensors"
    whole = torch_weights.to_bytes(make_arrays())
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            length = draw.choice([len(whole), draw.randrange(len(whole))])
            path.write_bytes(bytes(broken[:length]))
            convert(torch_weights.read_file(path))
        except UserError as error:
            assert "\n" not in str(error)
