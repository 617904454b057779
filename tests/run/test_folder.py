"""Write a model as a folder, and read it with every command that reads a working directory."""

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import commands
import lstm_jax
from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.convert import transfer
from lstm_jax.errors import UserError
from lstm_jax.export import page
from lstm_jax.run import model_file, workdir


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny trained model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    transfer.export_folder(trained, directory, "float32")
    return directory


def test_a_folder_holds_the_model_of_its_run(trained: Path, folder: Path, tmp_path: Path) -> None:
    before, after = workdir.load_trained(trained), workdir.load_trained(folder)
    assert (after.config, after.step) == (before.config, before.step)
    assert after.vocabulary.tokens == before.vocabulary.tokens
    assert jax.tree.map(np.array_equal, after.params, before.params) == jax.tree.map(
        lambda _: True, before.params
    )
    names = {"README.md", workdir.CONFIG, workdir.MODEL, workdir.VOCABULARY}
    assert {path.name for path in folder.iterdir()} == names
    card = (folder / "README.md").read_text()
    assert "# tiny\n" in card and "| test | " in card
    assert "Text:\n\n    text.txt, license: unknown" in card
    small = tmp_path / "small"
    transfer.export_folder(folder, small, "bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), before.params)
    jax.tree.map(np.testing.assert_array_equal, workdir.load_trained(small).params, rounded)
    assert (small / workdir.MODEL).stat().st_size < 0.6 * (folder / workdir.MODEL).stat().st_size


def test_a_file_with_holes_is_damaged_before_it_is_read(tmp_path: Path) -> None:
    path, count = tmp_path / "model.safetensors", 2**24 + 1
    params = {"w": jax.ShapeDtypeStruct((count,), jnp.float32)}
    checksum = hashlib.sha256(b"1" + bytes(4 * count)).hexdigest()
    metadata = {"step": "1", "sha256": checksum}
    arrays = {"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    header = json.dumps({"__metadata__": metadata, **arrays}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + 4 * count)
    assert path.stat().st_blocks, "this file system does not count blocks"
    with pytest.raises(UserError, match="is damaged, or not a model"):
        model_file.read_params(path, params)


def test_a_file_is_hashed_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    params = {name: jnp.full(2**18, i, jnp.float32) for i, name in enumerate("abcdefgh")}
    model_file.write_params(path, params, 7, "float32")
    tracemalloc.start()
    try:
        again, step = model_file.read_params(path, params)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert peak < 1.5 * path.stat().st_size  # JAX's arrays may be those of the file.


def test_names_of_a_strange_config_and_directory_are_shown_as_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "\x1b[31mred"
    shutil.copytree(folder, copy)
    strange = "<script>\x1b[31m\n# Title\n"
    config = config_lib.change_fields(
        workdir.load_config(folder), {"data.path": strange, "data.sha256": strange}
    )
    workdir.save_config(copy, config)
    transfer.export_folder(copy, copy.with_suffix(".card"), "float32")
    lines = (copy.with_suffix(".card") / "README.md").read_text().splitlines()
    assert all(line.startswith("    ") for line in lines if "<script>" in line)
    assert lines.count("# Title") == 0 and all(map(str.isprintable, lines))
    transfer.export_weights(copy, tmp_path / "\x1b[31m.safetensors")
    page.write_page(copy, "To be, or not")
    assert "\x1b" not in capsys.readouterr().out


def test_the_file_is_one_of_safetensors(folder: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = library.load_file(folder / workdir.MODEL)
    params = workdir.load_trained(folder).params
    np.testing.assert_array_equal(arrays["lstm_0.bias"], params["lstm_0"]["bias"])
    assert len(arrays) == len(jax.tree.leaves(params))


@pytest.mark.slow
def test_every_command_reads_a_folder(trained: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for module, arguments in {
        "sample": ["--length=30", "--prompt=ROMEO:"],
        "evaluate": [],
        "export": ["--length=200", f"--to={tmp_path / 'page.html'}"],
        "convert": [f"--to={tmp_path / 'again'}", "--dtype=bfloat16"],
    }.items():
        done = commands.run(module, f"--workdir={copy}", *arguments)
        assert done.returncode == 0, done.stderr
        if module in ("sample", "evaluate"):  # The alias of the flag.
            assert commands.run(module, f"--model={trained}", *arguments).stdout == done.stdout
    assert lstm_jax.load([copy, trained]).generate("A", length=5).startswith("A")
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )


@pytest.mark.slow
def test_a_run_starts_from_a_folder_but_not_in_it(
    folder: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds a model without its run: .*--init_from "):
        training.train(tiny_config, folder)
    tiny_config.init_from, tiny_config.max_steps = str(folder), 1
    assert training.train(tiny_config, tmp_path / "run", quiet=True) == 0
    assert workdir.load_config(tmp_path / "run").init_from == str(folder)


def test_any_flipped_byte_of_the_parameters_is_detected(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = (folder / workdir.MODEL).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(0, header, 37), *range(header, len(content), len(content) // 7)]:
        flipped = content[:at] + bytes([content[at] ^ 0x04]) + content[at + 1 :]
        (copy / workdir.MODEL).write_bytes(flipped)
        with pytest.raises(UserError, match=r"is damaged|does not hold the model"):
            workdir.load_params(copy, workdir.load_trained(folder).model)


def test_an_error_names_a_model_that_is_not_the_one_of_the_config(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = (folder / workdir.MODEL).read_bytes()
    for changed in (content[:-1], content + b"\0", b"", b"\xff" * 100):
        (copy / workdir.MODEL).write_bytes(changed)
        with pytest.raises(UserError, match=r"model.safetensors is damaged"):
            workdir.load_trained(copy)
    vocabulary = workdir.load_vocabulary(copy)
    fields = {**vocabulary.to_fields(), "units": vocabulary.tokens[:-1]}
    workdir.save_vocabulary(copy, type(vocabulary).from_fields(json.loads(json.dumps(fields))))
    (copy / workdir.MODEL).write_bytes(content)
    with pytest.raises(UserError, match="does not hold the model that the config describes"):
        workdir.load_trained(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=FOLDER"], "exists: remove it, or use another --to"),
        (
            ["--to=x.safetensors", "--dtype=bfloat16"],
            "--dtype is for --to with the name of a folder",
        ),
        (["--to=x", "--drop_special"], "--drop_special is for --to with the name of a file"),
        (["--to=x.pt2"], "end in .safetensors, or have no suffix, for a folder"),
    ],
)
def test_a_mistake_gives_one_line(arguments: list[str], message: str, folder: Path) -> None:
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    done = commands.run("convert", f"--workdir={folder}", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr
