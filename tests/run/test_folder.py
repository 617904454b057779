"""Write a model as a folder; read it, also a damaged one or one that was made to do harm."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import draws
import lstm_jax
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import transfer
from lstm_jax.data import files
from lstm_jax.errors import UserError
from lstm_jax.export import page
from lstm_jax.run import workdir


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny trained model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    transfer.export_folder(trained, directory, "float32")
    return directory


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder, to change."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_holds_the_model_of_its_run(trained: Path, folder: Path, tmp_path: Path) -> None:
    before, after = lstm_jax.load(trained), lstm_jax.load(folder)
    assert (after.config, after.step) == (before.config, before.step)
    assert after.vocabulary.tokens == before.vocabulary.tokens
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    names = {workdir.CONFIG, workdir.MODEL, workdir.VOCABULARY}
    assert {path.name for path in folder.iterdir()} == names
    small = tmp_path / "small"
    transfer.export_folder(folder, small, "bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), before.params)
    jax.tree.map(np.testing.assert_array_equal, lstm_jax.load(small).params, rounded)
    assert (small / workdir.MODEL).stat().st_size < 0.6 * (folder / workdir.MODEL).stat().st_size
    arrays = safetensors.numpy.load_file(folder / workdir.MODEL)
    np.testing.assert_array_equal(arrays["lstm_0.bias"], after.params["lstm_0"]["bias"])
    assert lstm_jax.load([folder, trained]).generate("A", length=5).startswith("A")
    shutil.copytree(folder, tmp_path / "links", copy_function=os.symlink)
    assert lstm_jax.load(tmp_path / "links").step == before.step


def test_a_run_may_hold_weights_of_the_name_of_a_folder_s_file(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    transfer.export_weights(run, run / workdir.MODEL)
    before, after = lstm_jax.load(trained), lstm_jax.load(run)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_a_run_does_not_start_in_a_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="holds no complete run: restore checkpoints"):
        workdir.has_run(folder)


def test_any_flipped_byte_of_the_parameters_is_detected(folder: Path, copy: Path) -> None:
    content, model = (folder / workdir.MODEL).read_bytes(), lstm_jax.load(folder).model
    header = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(0, header, 37), *range(header, len(content), len(content) // 7)]:
        flipped = content[:at] + bytes([content[at] ^ 0x04]) + content[at + 1 :]
        (copy / workdir.MODEL).write_bytes(flipped)
        with pytest.raises(UserError, match=r"is damaged|does not hold the model"):
            workdir.read_params(copy / workdir.MODEL, model_lib.get_param_shapes(model))


def test_names_of_a_strange_config_and_directory_are_shown_as_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "\x1b[31mred"
    shutil.copytree(folder, copy)
    strange = "<script>\x1b[31m\n# Title\n"
    config = config_lib.complete_config(
        workdir.load_config(folder), {"data.path": strange, "data.sha256": strange}
    )
    workdir.save_fields(copy, config, workdir.load_vocabulary(folder))
    transfer.export_weights(copy, tmp_path / "\x1b[31m.safetensors")
    page.write_page(copy, "To be, or not")
    assert "\x1b" not in capsys.readouterr().out


Change = Callable[[Path], object]


def change_config(**changes: Any) -> Change:
    """Change fields of the config, by their names with __ for a dot, with a valid checksum."""

    def change(folder: Path) -> None:
        config = files.read_json(folder / workdir.CONFIG)
        for field, value in changes.items():
            *parents, last = field.split("__")
            at = config
            for parent in parents:
                at = at[parent]
            at[last] = value
        files.write_json(folder / workdir.CONFIG, config)

    return change


def change_vocabulary(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        fields = files.read_json(folder / workdir.VOCABULARY)
        size = len(fields["units"])
        fields |= changes
        fields["units"] = (fields["units"] + [f" {i}" for i in range(size)])[:size]
        files.write_json(folder / workdir.VOCABULARY, fields)

    return change


def change_header(header: bytes, length: int | None = None) -> Change:
    """Replace the header of the parameters, and perhaps only say that it has this length."""

    def change(folder: Path) -> None:
        content = (folder / workdir.MODEL).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        size = (len(header) if length is None else length).to_bytes(8, "little")
        (folder / workdir.MODEL).write_bytes(size + header + content[start:])

    return change


def change_dtypes(dtype: str, size: int = 4) -> Change:
    """Say that the parameters, float32, have another dtype, of `size` bytes."""

    def change(folder: Path) -> None:
        content = (folder / workdir.MODEL).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        arrays = [array for name, array in header.items() if name != "__metadata__"]
        for array in arrays:
            array["dtype"] = dtype
            array["data_offsets"] = [x * size // 4 for x in array["data_offsets"]]
        change_header(json.dumps(header).encode())(folder)
        end = 8 + len(json.dumps(header)) + max(x["data_offsets"][1] for x in arrays)
        os.truncate(folder / workdir.MODEL, end)

    return change


def link(name: str) -> Change:
    """Replace a file by a link to a device, like /dev/zero, which never ends."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/null")

    return change


def name_cell_file(folder: Path) -> None:
    """Let the config name a cell in a file of the folder, which would end the tests."""
    (folder / "cell.py").write_text("import os; os._exit(1)")
    change_config(model__cell=f"{folder}/cell.py:Cell")(folder)


def write_infinity(folder: Path) -> None:
    trained = lstm_jax.load(folder)
    params = jax.tree.map(lambda x: x.at[0].set(float("inf")), trained.params)
    workdir.write_params(folder / workdir.MODEL, params, 1, "float32")


NESTED = '{"a":' * 900 + "1" + "}" * 900
DAMAGED, OTHER = "is damaged, or not a model", "does not hold the model that the config describes"
CASES: dict[str, tuple[Change, str]] = {
    "a file of a cell": (name_cell_file, "whose code runs only if you name it"),
    "a config of lists": (lambda f: (f / workdir.CONFIG).write_text("[" * 10**5), "too deeply"),
    "a longer file": (lambda f: (f / workdir.MODEL).open("ab").write(b"0"), DAMAGED),
    "a config of dicts": (
        lambda f: files.write_json(f / workdir.CONFIG, {"model": json.loads(NESTED)}),
        r"there is no field model\.a:",
    ),
    "a huge config": (lambda f: os.truncate(f / workdir.CONFIG, 2**40), "config.json .*too large"),
    "a config that is a device": (link(workdir.CONFIG), "config.json .*not a regular file"),
    "a device of tokens": (link(workdir.VOCABULARY), "vocabulary.json .*not a regular file"),
    "a device of parameters": (link(workdir.MODEL), "safetensors: it is not a regular file"),
    "integers": (change_dtypes("I32"), DAMAGED),
    "float8": (change_dtypes("F8_E4M3", 1), DAMAGED),
    "an option that is a list": (change_config(model__options={"x": [1]}), r"options is .* \[1\]"),
    "an empty file": (lambda f: (f / workdir.MODEL).write_bytes(b""), DAMAGED),
    "a header of lists": (change_header(b"[" * 10**5), DAMAGED),
    "no metadata": (change_header(b'{"__metadata__": 1}'), DAMAGED),
    "a header of 2**63 bytes": (change_header(b"{}", 2**63), DAMAGED),
    "a terabyte": (change_config(model__hidden_size=2**18), OTHER),
    "no number": (write_infinity, "are not finite"),
    "a token twice": (change_vocabulary(units=["", "[UNK]", *"aa"]), "a token occurs twice"),
    "a surrogate": (change_vocabulary(kind="bytes", units=["", "[UNK]", "\ud800"]), "damaged"),
    "endless rounds": (
        change_config(model__cell="mogrifier", model__options={"rounds": 10**5}),
        "rounds",
    ),
}
VALUES: tuple[Any, ...] = (
    "/dev/zero", "/**/*x*", "a" * 300, "a\0b", '"""', "\x1b[31m", "\udcff", "", None, True, -1, 0,
    2**31, 2**70, 1e308, float("inf"), [], {}, ["a", "b"], [[1], 2, 3],
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_was_made_to_do_harm(name: str, copy: Path) -> None:
    change, message = CASES[name]
    change(copy)
    with pytest.raises(UserError, match=message) as error:
        lstm_jax.load(copy)
    assert "\n" not in str(error.value)


def test_any_value_of_a_field_is_read_or_named(folder: Path, copy: Path) -> None:
    fields = [field for field, _ in config_lib.flatten(config_lib.default())]
    rng = random.Random(draws.SEED)
    for _ in range(60 * draws.TIMES):
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        field, value = rng.choice(fields), rng.choice(VALUES)
        change_config(**{field.replace(".", "__"): value})(copy)
        try:
            trained = lstm_jax.load(copy)
        except UserError as error:
            assert "\n" not in str(error), (field, value)
        else:
            assert trained.step, (field, value)
