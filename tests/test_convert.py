"""Convert weights of Keras and PyTorch, from stored files and with the libraries if installed."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import models
import runs
from lstm_jax import config, generation, training
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.controls import Controls
from lstm_jax.convert import keras_weights, onnx_graph, torch_weights, transfer, weights
from lstm_jax.data import files, texts
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.vocabulary import Vocabulary

pytest.importorskip("h5py")
pytest.importorskip("safetensors")

FIXTURES = Path(__file__).with_name("fixtures")
TEXT = FIXTURES / "text.txt"
TOKENS = FIXTURES / "vocabulary.json"
STORED = {
    "keras_lstm.keras": ("lstm", 2),
    "keras_gru.weights.h5": ("gru", 1),
    "torch_lstm.safetensors": ("lstm", 3),
    "torch_gru.safetensors": ("gru", 2),
    "torch_rnn.safetensors": ("rnn", 1),
}
WRITERS = {
    ".keras": (keras_weights.write_archive, keras_weights.read_archive),
    ".weights.h5": (keras_weights.write_weights, keras_weights.read_weights),
    ".safetensors": (torch_weights.write_state_dict, torch_weights.read_state_dict),
}


def compute_logits(trained: workdir.Trained, text: str) -> np.ndarray:
    """Return the logits after each character, [time, vocabulary]."""
    ids = trained.vocabulary.encode(text)[None]
    carry = trained.model.initial_carry(1)
    return np.asarray(models.apply(trained.model, trained.params, ids, carry)[0][0])


def generate_greedily(trained: workdir.Trained, prompt: str, length: int) -> str:
    (text,) = generation.generate_texts(
        trained.model,
        trained.params,
        trained.vocabulary,
        jax.random.key(0),
        prompt=prompt,
        length=length,
        controls=Controls(temperature=0),
    )
    return text.removeprefix(prompt)


def make_weights(tokens: int = 30, **fields: Any) -> weights.Weights:
    """Return random weights, including biases."""
    model = model_lib.LanguageModel(tokens, fields.pop("embedding_size", 6), 5, **fields)
    return weights.from_model(model, models.draw_params(model, 1.0))


def save(own: weights.Weights, path: Path) -> Path:
    """Write weights in the format of the path's extension."""
    write, _ = next(functions for end, functions in WRITERS.items() if path.name.endswith(end))
    path.write_bytes(write(own))
    return path


@pytest.mark.parametrize("name", STORED)
def test_an_imported_model_reproduces_the_logits_of_its_library(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    transfer.import_weights(FIXTURES / name, directory, str(TOKENS), None)
    trained = workdir.load_trained(directory)
    assert (trained.model.cell, trained.model.num_layers, trained.step) == (*STORED[name], 0)
    with np.load(FIXTURES / "logits.npz") as expected:
        ours = compute_logits(trained, TEXT.read_text())[::10]
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-5)
    # No partial directory is left, and the text gives the same vocabulary.
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    transfer.import_weights(FIXTURES / name, tmp_path / "by_text", None, str(TEXT))
    assert workdir.load_vocabulary(tmp_path / "by_text").tokens == trained.vocabulary.tokens


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_exported_weights_are_read_back_unchanged(cell: str) -> None:
    own = make_weights(cell=cell, num_layers=11)
    for write, read in WRITERS.values():
        again = read(io.BytesIO(write(own)))
        assert again.cell == cell
        for one, other in zip(jax.tree.leaves(own[1:]), jax.tree.leaves(again[1:]), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("end", WRITERS)
def test_tied_embeddings_stay_tied(end: str) -> None:
    # The layers have 5, 5 and 6 hidden units: with tied embeddings, the last is as large as the
    # embedding.
    own = make_weights(num_layers=3, tie_embeddings=True)
    write, read = WRITERS[end]
    fields, params = weights.to_model(read(io.BytesIO(write(own))))
    sizes = {"embedding_size": 6, "hidden_size": 5, "num_layers": 3}
    assert fields == {"cell": "lstm", **sizes, "tie_embeddings": True}
    assert set(params["dense"]) == {"bias"}


@pytest.mark.slow
def test_a_run_survives_export_and_import(trained: Path, text_file: Path, tmp_path: Path) -> None:
    before = workdir.load_trained(trained)
    text = text_file.read_text(encoding="utf-8")[:300]
    for end, drop in ((".keras", False), (".weights.h5", False), (".safetensors", True)):
        target, directory = tmp_path / f"model{end}", tmp_path / f"run{end}"
        transfer.export_weights(trained, target, drop_special=drop)
        transfer.import_weights(target, directory, f"{target}.vocabulary.json", str(text_file))
        after = workdir.load_trained(directory)
        assert after.vocabulary.tokens == before.vocabulary.tokens
        # Rows that were left out are added again and never predicted.
        ours, theirs = compute_logits(before, text)[:, 2:], compute_logits(after, text)
        np.testing.assert_allclose(theirs[:, 2:], ours, rtol=0, atol=1e-5)
        if drop:
            assert (theirs[:, :2] == -30).all()
        assert generate_greedily(after, "ROMEO:", 80) == generate_greedily(before, "ROMEO:", 80)
    assert evaluate_directory(directory) == pytest.approx(evaluate_directory(trained), abs=1e-3)


def evaluate_directory(directory: Path) -> float:
    """Return the loss on the test split of the run's text."""
    trained = workdir.load_trained(directory)
    text = texts.load_texts_of_run(trained.config.data, None)["test"]
    return loss_lib.compute_loss(trained.model, trained.params, text.encode(trained.vocabulary))


@pytest.mark.slow
def test_training_starts_from_imported_weights(
    trained: Path, tiny_config: Any, tmp_path: Path
) -> None:
    transfer.export_weights(trained, tmp_path / "model.keras")
    beside = str(tmp_path / "model.keras.vocabulary.json")
    transfer.import_weights(tmp_path / "model.keras", tmp_path / "in", beside, None)
    tiny_config.init_from = str(tmp_path / "in")
    tiny_config.max_steps = 1
    assert training.train(config.complete_config(tiny_config), tmp_path / "run") == 0


def test_vocabularies_of_every_form(tmp_path: Path) -> None:
    own = make_weights(tokens=6)
    model = save(own, tmp_path / "model.safetensors")
    tokens = ["\n", "\\", "b", "a"]
    forms: dict[str, Any] = {
        "own.json": {"kind": "characters", "stop": "", "units": ["", "[UNK]", *tokens]},
        "list.json": ["", "[UNK]", *tokens],
        "short.json": tokens,
        "ids.json": {token: i for i, token in enumerate(["", "[UNK]", *tokens])},
        "lines.txt": "\n[UNK]\n\\n\n\\\\\nb\na\n",
    }
    for name, form in forms.items():
        path = tmp_path / name
        path.write_text(form if isinstance(form, str) else json.dumps(form))
        directory = tmp_path / f"run_{name}"
        if name == "short.json":  # Only a model without "" and "[UNK]" has these tokens.
            with pytest.raises(UserError, match="the model has 6 tokens, but the vocabulary has 4"):
                transfer.import_weights(model, directory, str(path), None)
            assert not directory.exists()
            continue
        transfer.import_weights(model, directory, str(path), None)
        loaded = workdir.load_trained(directory)
        assert loaded.vocabulary.tokens == ("", "[UNK]", *tokens)
        np.testing.assert_array_equal(loaded.params["embedding"]["embedding"], own.embedding)


@pytest.mark.parametrize(
    ("tokens", "names"),
    [(["[UNK]", *"abcd"], "''"), ([*"abcd"], "'' and '[UNK]'"), (["", *"abcd"], "'[UNK]'")],
)
def test_missing_special_tokens_are_added_and_never_predicted(
    tokens: list[str], names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = make_weights(len(tokens))
    model = save(own, tmp_path / "model.keras")
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    transfer.import_weights(model, tmp_path / "run", str(tmp_path / "tokens.json"), None)
    assert f"Added {names}, " in capsys.readouterr().out
    trained = workdir.load_trained(tmp_path / "run")
    assert trained.vocabulary.tokens == ("", "[UNK]", *"abcd")
    carry = trained.model.initial_carry(1)
    model_of_own = trained.model.clone(vocabulary_size=len(tokens))
    ids = np.array([[tokens.index(token) for token in "dbc"]])
    expected, _ = models.apply(model_of_own, weights.to_model(own)[1], ids, carry)
    ids = trained.vocabulary.encode("dbc")[None]
    logits, _ = models.apply(trained.model, trained.params, ids, carry)
    known = [trained.vocabulary.tokens.index(token) for token in tokens]
    np.testing.assert_allclose(logits[..., np.array(known)], expected, rtol=0, atol=1e-6)
    assert (np.delete(logits, known, axis=-1) == -30).all()


def test_documents_keep_their_stop_token(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_text("ab\n\nba\n\n", stop="\n\n")
    model = save(make_weights(tokens=len(vocabulary)), tmp_path / "model.keras")
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary.to_fields()))
    transfer.import_weights(model, tmp_path / "run", str(tmp_path / "vocabulary.json"), None)
    assert workdir.load_trained(tmp_path / "run").vocabulary.stop == "\n\n"
    assert workdir.load_config(tmp_path / "run").data.document_separator == "blank_line"


def test_the_characters_of_all_splits_are_the_vocabulary(tmp_path: Path) -> None:
    for name, text in (("train", "ab"), ("valid", "ca"), ("test", "db")):
        (tmp_path / f"{name}.txt").write_text(text)
    model = save(make_weights(tokens=4), tmp_path / "model.safetensors")
    text_files = ";".join(f"{tmp_path}/{name}.txt" for name in ("train", "valid", "test"))
    transfer.import_weights(model, tmp_path / "run", None, text_files)
    assert workdir.load_vocabulary(tmp_path / "run").tokens == ("", "[UNK]", *"abcd")
    assert workdir.load_config(tmp_path / "run").data.path == text_files


def change_archive(content: bytes, change: Any) -> bytes:
    """Return a .keras file with its list of layers changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    fields = json.loads(members["config.json"])
    change(fields["config"]["layers"])
    members["config.json"] = json.dumps(fields).encode()
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return changed.getvalue()


@pytest.mark.parametrize(
    ("at", "field", "value", "message"),
    [
        (2, "activation", "relu", "'lstm' has activation='relu': only 'tanh' can be"),
        (2, "recurrent_activation", "hard_sigmoid", "recurrent_activation='hard_sigmoid'"),
        (2, "return_sequences", False, "'lstm' has return_sequences=False: only True"),
        (2, "go_backwards", True, "go_backwards=True"),
        (1, "mask_zero", True, "mask_zero=True"),
        (3, "activation", "relu", "'dense' has activation='relu'"),
        (2, None, "Bidirectional", "'lstm' can't be converted: it is a Bidirectional"),
        (2, None, "LayerNormalization", "it is a LayerNormalization"),
        (2, None, "Dense", "its layers are Embedding, Dense, Dense: they must be"),
    ],
)
def test_an_error_names_what_is_unsupported_in_a_keras_model(
    at: int, field: str | None, value: Any, message: str
) -> None:
    def change(layers: list[dict[str, Any]]) -> None:
        if field is None:
            layers[at]["class_name"] = value
        else:
            layers[at]["config"][field] = value

    content = change_archive(keras_weights.write_archive(make_weights()), change)
    with pytest.raises(UserError) as caught:
        keras_weights.read_archive(io.BytesIO(content))
    assert message in str(caught.value)


def rename_arrays(arrays: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {name.replace(old, new): array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "lstm.weight_ih_l0_reverse": a["lstm.weight_ih_l0"]}, "bidirectional"),
        (lambda a: {**a, "lstm.weight_hr_l0": a["lstm.weight_hh_l0"]}, "projection"),
        (
            lambda a: {**a, "norm.weight": a["linear.bias"]},
            "layers with weights are embedding, linear, norm",
        ),
        (lambda a: {k: v for k, v in a.items() if "lstm" not in k}, "no recurrent layer"),
        (lambda a: rename_arrays(a, "lstm.weight_hh_l0", "x.y"), "lacks weight_ih or weight_hh"),
        (lambda a: {**a, "lstm.weight_ih_l0": a["lstm.weight_ih_l0"][:, 1:]}, "takes 5 features"),
        (lambda a: {**a, "lstm.bias_ih_l0": a["lstm.bias_ih_l0"] * np.nan}, "not finite"),
        (
            lambda a: {**a, "lstm.bias_ih_l0": a["lstm.bias_ih_l0"][1:]},
            "biases of lstm (layer 0) don't match",
        ),
        (
            lambda a: {**a, "lstm.weight_hh_l0": a["lstm.bias_ih_l0"]},
            "its recurrent kernel is [20]",
        ),
        (lambda a: {**a, "linear.bias": a["linear.bias"].astype(np.int8)}, "int8, not floating"),
        (lambda a: {**a, "embedding.weight": a["embedding.weight"][1:]}, "the same vocabulary"),
        (
            lambda a: {**a, **{k.replace("lstm", "up"): v for k, v in a.items() if "lstm" in k}},
            "names of lstm (layer 0), up (layer 0) don't determine their order",
        ),
    ],
)
def test_an_error_names_what_is_unsupported_in_a_torch_model(change: Any, message: str) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = change(library.load(torch_weights.write_state_dict(make_weights())))
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with pytest.raises(UserError) as caught:
        torch_weights.read_state_dict(io.BytesIO(library.save(arrays)))
    assert message in str(caught.value)


def test_torch_layers_with_other_names_and_in_float16() -> None:
    library = pytest.importorskip("safetensors.numpy")
    own = make_weights(num_layers=2)
    arrays = rename_arrays(
        library.load(torch_weights.write_state_dict(own)), "embedding.", "encoder."
    )
    for i in range(2):  # Two modules with one layer each, with the names of LSTMCell.
        arrays = rename_arrays(arrays, f"lstm.weight_ih_l{i}", f"rnn{i + 9}.weight_ih")
        arrays = rename_arrays(arrays, f"lstm.weight_hh_l{i}", f"rnn{i + 9}.weight_hh")
        del arrays[f"lstm.bias_hh_l{i}"]
        arrays = rename_arrays(arrays, f"lstm.bias_ih_l{i}", f"rnn{i + 9}.bias_ih")
    del arrays["linear.bias"]
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    again = torch_weights.read_state_dict(io.BytesIO(library.save(halves)))
    assert again.embedding.dtype == np.float32 and (again.bias == 0).all()
    for one, other in zip(own.layers, again.layers, strict=True):
        for name, array in one.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-3)
    # A tied matrix may be stored under one name only.
    tied = library.load(torch_weights.write_state_dict(make_weights(tie_embeddings=True)))
    del tied["linear.weight"]
    assert weights.to_model(torch_weights.read_state_dict(io.BytesIO(library.save(tied))))[0][
        "tie_embeddings"
    ]


def test_layers_that_other_libraries_lack_raise_an_error() -> None:
    for field, value in (("cell", "mogrifier"), ("layer_norm", True), ("block", "residual")):
        for graph in (False, True):
            model = config.default().model
            weights.check_model(model, graph)
            model[field] = value
            with pytest.raises(UserError, match=f"have no layer with model.{field}={value!r}"):
                weights.check_model(model, graph)
    model = config.default().model
    model.skip_connections = True
    weights.check_model(model, graph=True)
    with pytest.raises(UserError, match="PyTorch have no layer with .*: write a .onnx file"):
        weights.check_model(model)
    own = make_weights(num_layers=2)
    uneven = own._replace(layers=[own.layers[0], make_weights(embedding_size=5).layers[0]])
    with pytest.raises(UserError, match="takes 5 features"):
        weights.check_weights(own._replace(layers=uneven.layers[::-1]))
    with pytest.raises(UserError, match="have 5, 6 hidden units: all layers"):
        weights.to_model(
            own._replace(layers=[own.layers[0], {"recurrent_kernel": np.zeros((6, 24))}])
        )


@pytest.mark.parametrize(
    ("name", "import_error", "export_error"),
    [
        ("quick.pt", "safetensors.torch.save", "name a file that ends in .safetensors"),
        ("quick.h5", "save it in Keras 3", "name a file that ends in .keras or .weights.h5"),
        ("quick.bin", "must end in one of these", "must end in one of these"),
    ],
)
def test_an_error_for_an_unknown_file_extension_names_the_remedy(
    name: str, import_error: str, export_error: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=import_error):
        transfer.import_weights(tmp_path / name, tmp_path / "run", None, str(TEXT))
    with pytest.raises(UserError, match=export_error):
        transfer.export_weights(tmp_path / "run", tmp_path / name)


def test_a_diverged_model_is_not_exported(trained: Path, tmp_path: Path) -> None:
    runs.make_diverged_run(trained, tmp_path / "run")
    with pytest.raises(UserError, match="its parameters are not finite"):
        transfer.export_weights(tmp_path / "run", tmp_path / "model.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_says_why_a_model_is_not_exported(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^there is no trained model in {tmp_path}/nothing"):
        transfer.export_weights(tmp_path / "nothing", tmp_path / "model.keras")
    shutil.copytree(trained, tmp_path / "run")
    changed = config.change_fields(workdir.load_config(trained), {"model.cell": "mogrifier"})
    workdir.save_config(tmp_path / "run", changed)
    with pytest.raises(UserError, match=f"^{tmp_path}/run can't be converted: .* have no layer"):
        transfer.export_weights(tmp_path / "run", tmp_path / "model.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_existing_files_are_kept_and_nothing_partial_is_written(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note").write_text("of the user's")
    (tmp_path / "there.keras").write_text("of the user's")
    (tmp_path / "broken.keras").write_bytes((FIXTURES / "keras_lstm.keras").read_bytes()[:900])
    model = FIXTURES / "keras_lstm.keras"
    (tmp_path / "words.json").write_text(json.dumps(["", "[UNK]", *"abcdefghijklmnopqrst", "word"]))
    for arguments, message in (
        ((model, tmp_path / "run", str(TOKENS), None), "is not empty"),
        ((model, tmp_path / "new", None, None), "give --vocabulary FILE, or --text FILE"),
        ((model, tmp_path / "new", str(tmp_path / "words.json"), None), "the model has"),
        ((model, tmp_path / "new", "nothing.json", None), "can't read nothing.json"),
        ((tmp_path / "broken.keras", tmp_path / "new", str(TOKENS), None), "not a .keras file"),
    ):
        with pytest.raises(UserError) as caught:
            transfer.import_weights(*arguments)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="there.keras exists"):
        transfer.export_weights(trained, tmp_path / "there.keras")
    with pytest.raises(UserError, match="can't write"):
        transfer.export_weights(trained, tmp_path / "nothing" / "there.keras")
    assert (tmp_path / "there.keras").read_text() == "of the user's"
    names = {"run", "there.keras", "broken.keras", "words.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("module", "write"),
    [
        ("h5py", keras_weights.write_archive),
        ("safetensors", torch_weights.write_state_dict),
        ("onnx", onnx_graph.write_graph),
    ],
)
def test_an_error_names_a_missing_library(
    module: str, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}: pip install 'lstm-jax\[convert\]'$"):
        write(make_weights())


@pytest.mark.parametrize(
    ("cell", "tied", "skip"), [("lstm", False, True), ("gru", True, False), ("rnn", False, False)]
)
def test_a_graph_has_the_same_logits_in_onnx_runtime(cell: str, tied: bool, skip: bool) -> None:
    onnx = pytest.importorskip("onnx")
    runtime: Any = pytest.importorskip("onnxruntime")
    model = model_lib.LanguageModel(
        30, 6, 5, num_layers=3, cell=cell, tie_embeddings=tied, skip_connections=skip
    )
    params = models.draw_params(model, 1.0)
    graph = onnx_graph.write_graph(weights.from_model(model, params))
    onnx.checker.check_model(graph, full_check=True)
    session = runtime.InferenceSession(graph)
    names = [output.name for output in session.get_outputs()]
    assert names[0] == "logits" and session.get_inputs()[0].name == "ids"
    # Two texts, in parts of several lengths, from a carry that is not zero.
    ids = np.random.default_rng(1).integers(0, 30, (2, 12))
    carry = jax.tree.map(lambda x: x + 0.3, model.initial_carry(2))
    given = {
        f"{state}_{i}": np.asarray(array)
        for i, layer in enumerate(carry)
        for state, array in layer._asdict().items()
    }
    for part in np.split(ids, [6], axis=1):
        expected, carry = models.apply(model, params, part, carry)
        results = dict(zip(names, session.run(names, {"ids": part, **given}), strict=True))
        np.testing.assert_allclose(results.pop("logits"), expected, atol=1e-4)
        given = {name.removeprefix("next_"): array for name, array in results.items()}
        for i, layer in enumerate(carry):
            for state, array in layer._asdict().items():
                np.testing.assert_allclose(given[f"{state}_{i}"], array, atol=1e-4)


def test_a_run_becomes_a_graph(trained: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime: Any = pytest.importorskip("onnxruntime")
    transfer.export_weights(trained, tmp_path / "tiny.onnx")
    own = workdir.load_trained(trained)
    text = text_file.read_text(encoding="utf-8")[:300]
    tokens = json.loads((tmp_path / "tiny.onnx.vocabulary.json").read_text())["units"]
    session = runtime.InferenceSession(tmp_path / "tiny.onnx")
    ids = np.array([[tokens.index(character) for character in text]])
    given = {put.name: np.zeros((1, put.shape[1]), np.float32) for put in session.get_inputs()[1:]}
    logits = session.run(["logits"], {"ids": ids, **given})[0]
    np.testing.assert_allclose(logits[0], compute_logits(own, text), atol=1e-4)


def test_a_compressed_archive_with_one_wrong_byte_raises_an_error() -> None:
    """Check that all errors of the decompressor become a `UserError`."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(keras_weights.write_archive(make_weights()))) as stored,
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file,
    ):
        for name in stored.namelist():
            file.writestr(name, stored.read(name)[:3000])
    whole = content.getvalue()
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        with pytest.raises(UserError):
            keras_weights.read_archive(io.BytesIO(bytes(broken)))


@pytest.mark.parametrize(
    ("name", "array", "options", "message"),
    [
        ("lstm/cell/vars/1", np.zeros((5, 16)), {}, r"its recurrent kernel is \[5, 16\]"),
        ("lstm/cell/vars/1", np.zeros((0, 16)), {}, r"its recurrent kernel is \[0, 16\]"),
        ("lstm/cell/vars/0", np.zeros((6, 15)), {}, "kernels and biases of .* don't match"),
        ("lstm/cell/vars/2", np.zeros(15), {}, "kernels and biases of .* don't match"),
        ("gru/cell/vars/2", np.zeros(15), {}, "reset_after=False"),
        ("dense/vars/1", np.zeros(30), {"compression": "gzip"}, "vars/1 is stored in chunks"),
    ],
)
def test_arrays_that_keras_does_not_write_raise_an_error(
    name: str, array: np.ndarray, options: dict[str, str], message: str
) -> None:
    import h5py

    cell = "gru" if name.startswith("gru") else "lstm"
    content = io.BytesIO(keras_weights.write_weights(make_weights(cell=cell)))
    with h5py.File(content, "a") as file:
        del file[f"layers/{name}"]
        file.create_dataset(f"layers/{name}", data=array.astype(np.float32), **options)
    with pytest.raises(UserError, match=message):
        keras_weights.read_weights(io.BytesIO(content.getvalue()))


def test_layers_numbered_without_an_underscore_are_in_order() -> None:
    import h5py

    own = make_weights(num_layers=2)
    content = io.BytesIO(keras_weights.write_weights(own))
    with h5py.File(content, "a") as file:
        # As the attributes of a subclassed model are named.
        for old, new in (("layers/lstm_1", "lstm2"), ("layers/lstm", "lstm1")):
            file.move(old, new)
    read = keras_weights.read_weights(io.BytesIO(content.getvalue()))
    for one, other in zip(own.layers, read.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_corrupted_weights_are_read_or_raise_a_one_line_error() -> None:
    draw = random.Random(0)
    for end, (write, read) in WRITERS.items():
        whole = write(make_weights())
        for _ in range(60):
            broken = bytearray(whole)
            for _ in range(draw.randrange(1, 4)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            try:
                length = draw.choice([len(whole), draw.randrange(len(whole))])
                read(io.BytesIO(bytes(broken[:length])))
            except UserError as error:
                assert "\n" not in str(error), end


# The tests below use the libraries themselves.


def assert_same_model(directory: Path, predict: Any, tokens: list[str]) -> None:
    """Assert that a run has the same logits and greedy text as a model of a library.

    `predict` computes its logits [time, vocabulary] from ids [1, time].
    """
    trained, text = workdir.load_trained(directory), TEXT.read_text()

    def read(text: str) -> np.ndarray:
        logits: np.ndarray = predict(np.array([[tokens.index(character) for character in text]]))
        return logits

    ours = compute_logits(trained, text)[:, -len(tokens) :]
    np.testing.assert_allclose(ours, read(text), rtol=0, atol=1e-5)
    greedy = generate_greedily(trained, text[:6], 60)
    characters = trained.vocabulary.tokens[2:]
    best = read(text[:6] + greedy)[5:-1, -len(characters) :].argmax(axis=1)
    assert greedy == "".join(characters[i] for i in best)


@pytest.mark.parametrize(("cell", "num_layers"), [("lstm", 1), ("lstm", 3), ("gru", 2), ("rnn", 1)])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # In Keras.
def test_keras_and_back(cell: str, num_layers: int, tmp_path: Path) -> None:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras: Any = pytest.importorskip("keras", reason="Keras is not installed")
    layers = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}
    tokens = ["", "[UNK]", *sorted(set(TEXT.read_text()))]

    def make_model() -> Any:
        recurrent = [layers[cell](32, return_sequences=True) for _ in range(num_layers)]
        ends = keras.layers.Embedding(len(tokens), 16), keras.layers.Dense(len(tokens))
        model = keras.Sequential([ends[0], *recurrent, ends[1]])
        model(np.zeros((1, 1), np.int32))  # Makes its weights.
        return model

    model, rng = make_model(), np.random.default_rng(0)
    model.set_weights([0.2 * rng.normal(size=variable.shape) for variable in model.weights])
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    for end in (".keras", ".weights.h5"):
        directory = tmp_path / f"run{end}"
        transfer.import_weights(tmp_path / f"model{end}", directory, None, str(TEXT))
        assert_same_model(directory, lambda ids: np.asarray(model(ids))[0], tokens)
    transfer.export_weights(directory, tmp_path / "back.keras")
    transfer.export_weights(directory, tmp_path / "back.weights.h5")
    fresh = make_model()
    fresh.load_weights(tmp_path / "back.weights.h5")
    for back in (keras.models.load_model(tmp_path / "back.keras"), fresh):
        for one, other in zip(model.weights, back.weights, strict=True):
            if cell != "gru":  # The import merges its two biases.
                np.testing.assert_array_equal(one.value, other.value)
        assert_same_model(directory, lambda ids, back=back: np.asarray(back(ids))[0], tokens)


@pytest.mark.parametrize(("cell", "num_layers"), [("lstm", 3), ("gru", 2), ("rnn", 1)])
def test_torch_and_back(cell: str, num_layers: int, tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'bench')")
    safetensors: Any = pytest.importorskip("safetensors.torch")
    tokens = sorted(set(TEXT.read_text()))  # Most vocabularies have no "" and "[UNK]".
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
            self.embedding = torch.nn.Embedding(len(tokens), 16)
            setattr(self, cell, layers[cell](16, 32, num_layers, batch_first=True))
            self.linear = torch.nn.Linear(32, len(tokens))

        def forward(self, ids: Any) -> Any:
            return self.linear(getattr(self, cell)(self.embedding(ids))[0])

    model = Model()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")

    def predict(ids: np.ndarray, model: Any = model) -> np.ndarray:
        with torch.no_grad():
            predicted: np.ndarray = model(torch.from_numpy(ids.astype(np.int64)))[0].numpy()
        return predicted

    directory = tmp_path / "run"
    transfer.import_weights(tmp_path / "model.safetensors", directory, None, str(TEXT))
    assert_same_model(directory, predict, tokens)
    transfer.export_weights(directory, tmp_path / "back.safetensors", drop_special=True)
    back = Model()
    back.load_state_dict(safetensors.load_file(tmp_path / "back.safetensors"))
    assert_same_model(directory, lambda ids: predict(ids, back), tokens)


@pytest.mark.process
def test_leftovers_of_a_killed_conversion_are_removed_by_the_next(
    trained: Path, tmp_path: Path
) -> None:
    file, target = tmp_path / "model.safetensors", tmp_path / "new"
    transfer.export_weights(trained, file)
    beside = str(tmp_path / "model.safetensors.vocabulary.json")
    # Kill the process while it writes to its directory.
    script = """
import os, sys
from pathlib import Path
from lstm_jax.convert import transfer
from lstm_jax.run import checkpoints
checkpoints.save_params = lambda *unused: os.kill(os.getpid(), 9)
transfer.import_weights(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], None)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(file), str(target), beside])
    assert killed.returncode == -9
    (left,) = tmp_path.glob(".new.*")
    with files.unfinished_directory(target) as other:  # It belongs to another process.
        transfer.import_weights(file, target, beside, None)
        assert other.is_dir() and not left.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["model.safetensors", Path(beside).name, "new"])


@pytest.mark.parametrize("end", WRITERS)
def test_a_file_with_less_data_than_it_declares_raises_an_error(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{end}"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match="it is not a "):
        transfer.import_weights(path, tmp_path / "new", None, __file__)
    if end == ".safetensors":
        return
    content = io.BytesIO()
    with pytest.importorskip("h5py").File(content, "w") as file:
        file.create_dataset("layers/embedding/vars/0", (30_000, 30_000), "f4", chunks=(1000, 1000))
    if end == ".keras":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("config.json", '{"class_name": "Mine"}')
            archive.writestr("model.weights.h5", content.getvalue() + bytes(2**28))
        message = "its model.weights.h5 has 268,4.* bytes, which is too large"
    else:
        path.write_bytes(content.getvalue())
        message = "the 3,600,000,000 bytes of .* are not in the file"
    with pytest.raises(UserError, match=message):
        transfer.import_weights(path, tmp_path / "new", None, __file__)


def test_an_archive_compressed_as_keras_never_does_raises_an_error() -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UserError, match="its config.json is compressed in a way"):
        keras_weights.read_archive(content)
