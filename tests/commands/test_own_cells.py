# ruff: noqa: D102
"""Train with cells in files of a user: the example of docs/cells.md, and broken ones."""

import functools
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import commands
import lstm_jax
import models
import runs
from lstm_jax import cells, training
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.cells.base import make_cell, reset_carry
from lstm_jax.cells.block import Block
from lstm_jax.errors import UserError
from lstm_jax.export import page
from lstm_jax.matmul import matmul
from lstm_jax.run import workdir
from pages import find_blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cells.md"
FOREIGN = ROOT / "tests" / "fixtures" / "delta_cell.py"


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """Return a file with the example."""
    (source,) = (block.text for block in find_blocks(PAGE) if block.text.startswith("# my_cells"))
    assert len(source.splitlines()) <= 60
    path = tmp_path / "my_cells.py"
    path.write_text(source)
    return path


def name_cell(config: ConfigDict, path: Path, kind: str = "CoupledLSTM") -> str:
    config.model.cell = f"{path}:{kind}"
    return config.model.cell


@pytest.mark.slow
def test_the_example_trains_and_resumes_bit_for_bit(
    own_file: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    name_cell(tiny_config, own_file)
    tiny_config.model.options = {"forget_bias": 0.5}
    tiny_config.optimizer.microbatches = 2
    for field in tiny_config.regularization:
        tiny_config.regularization[field] = 0.1
    training.train(tiny_config, tmp_path / "whole")
    with pytest.raises(runs.KilledError):
        training.train(tiny_config, tmp_path / "cut", runs.kill_at(90, "train"))
    moved = own_file.rename(own_file.with_name("moved.py"))
    name_cell(tiny_config, moved)  # A file may move.
    training.train(tiny_config, tmp_path / "cut")
    runs.assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = [workdir.load_config(tmp_path / name).model for name in ("whole", "cut")]
    assert [row.cell for row in rows] == [f"{own_file}:CoupledLSTM", f"{moved}:CoupledLSTM"]

    # Another option may not continue it.
    tiny_config.num_epochs = 3
    tiny_config.model.options = {}
    with pytest.raises(UserError, match="model.options was {'forget_bias': 0.5} and is {}"):
        training.train(tiny_config, tmp_path / "cut")


SPACE = """
def get_overrides(trial):
    return {"model.options.keys": trial.suggest_int("keys", 2, 4)}
"""


@pytest.mark.slow
def test_a_cell_of_somebody_else_needs_only_flags(text_file: Path, tmp_path: Path) -> None:
    their_file = tmp_path / "their cell.py"
    shutil.copy(FOREIGN, their_file)
    assert len(their_file.read_text().splitlines()) <= 60
    cell = f"{their_file}:DeltaCell"
    fields = [f"--config={ROOT}/experiments/quick.py", f"--config.data.path={text_file}"]
    fields += [f"--config.model.cell={cell}", "--config.model.options.warm_up=3.0"]
    fields += [*runs.TINY, "--config.sample.length=20"]

    run = functools.partial(commands.get_output, cwd=tmp_path)

    # The command that a run prints works.
    def generate(printed: str) -> str:
        command = shlex.split(printed.partition("Generate text: ")[2].partition("\n")[0])
        assert command[1:3] == ["-m", "lstm_jax.sample"]
        return run("sample", *command[3:], "--length=9")

    assert len(generate(run("main", *fields, "--config.max_steps=20", "--workdir=run"))) == 9 + 1
    resumed = run("main", *fields, "--config.max_steps=30", "--workdir=run")
    assert "Resuming from step 20" in resumed
    run("export", "--workdir=run", f"--cell={cell}")
    assert '"record": {' in (tmp_path / "run" / "page.html").read_text()
    (tmp_path / "space.py").write_text(SPACE)
    sweep = [*fields, "--config.max_steps=2", "--space=space.py", "--trials=1", "--workdir=sweep"]
    assert "| 0 | complete |" in run("sweep", *sweep)


@pytest.mark.slow
def test_reading_a_run_runs_only_the_file_that_the_user_names(
    own_file: Path, tiny_config: ConfigDict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_config.max_steps = 1
    name = name_cell(tiny_config, own_file)
    training.train(tiny_config, tmp_path / "run")
    mark = tmp_path / "mark"
    own_file.write_text(f"open({str(mark)!r}, 'w')\n" + own_file.read_text())
    capfd.readouterr()
    sample = functools.partial(commands.run, "sample", "--workdir", tmp_path / "run", "--length=5")
    cells.LOADED.clear()
    with pytest.raises(
        UserError, match=rf"whose code runs only if you name it: --cell {name}, cell= in Python"
    ):
        lstm_jax.load(tmp_path / "run")
    refused = sample()
    assert refused.returncode == 2 and not mark.exists()
    assert refused.stderr.count("\n") == 1 and f"if you name it: --cell {name}" in refused.stderr
    (tmp_path / "two.py").write_text(SOURCE)
    result = sample("--cell", name, "--cell", f"{tmp_path}/two.py:Mine")
    assert result.returncode == 0 and mark.exists()
    assert "CoupledLSTM" in str(lstm_jax.load(tmp_path / "run", cell=name))


SOURCE = """import flax.linen as nn
import jax.numpy as jnp
class Mine(nn.Module):
    input_size: int
    hidden_size: int
    scale: float = 1.0
    soft: bool = False
    def initial_carry(self, batch_size):
        return jnp.zeros((batch_size, self.hidden_size))
    @nn.compact
    def __call__(self, carry, inputs):
        return carry, nn.Dense(self.hidden_size)(inputs) + carry
"""
ACTIVATION = "    def activation(self, carry):\n        return carry + carry[:, 1:]\n"
RETURNED = "carry, nn.Dense(self.hidden_size)(inputs) + carry"


# A change of the file, by the message.
MISTAKES = {
    "own.py, line 1: ModuleNotFoundError": ("import flax", "import nothing_like_it, flax"),
    "own.py has no class Mine derived from flax": ("class Mine(nn.Module)", "class Mine"),
    r"the cell Mine \(.*own.py\): TypeError: .*'input_size'": ("    input_size: int\n", ""),
    "AttributeError: .*initial_carry": ("initial_carry", "first_carry"),
    "TypeError: add got": ("    @nn.comp", ACTIVATION + "    @nn.comp"),
    "TypeError: scan": (RETURNED, "(carry, carry), carry"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_cell_is_one_line(
    message: str, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(SOURCE.replace(*MISTAKES[message]))
    name_cell(tiny_config, path, "Mine")
    with pytest.raises(UserError, match=message) as error:
        training.train(tiny_config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run" / workdir.CONFIG).exists()


@pytest.mark.slow
def test_a_run_is_read_with_the_file_that_it_was_trained_with(
    tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.max_steps = 1
    for name in ("one", "two"):
        path = tmp_path / f"{name}.py"
        path.write_text(f"{SOURCE}# {name}\n")
        name_cell(tiny_config, path, "Mine")
        training.train(tiny_config, tmp_path / name, quiet=True)
    for name in ("one", "two"):
        trained = lstm_jax.load(tmp_path / name)
        assert trained.config.model.cell == f"{tmp_path / name}.py:Mine"
    cells.load_cell(f"{tmp_path}/one.py:Mine")
    assert [*cells.LOADED][-1] == f"{tmp_path}/one.py:Mine"
    # A mistake in a file that has changed is one line, too.
    path.write_text(SOURCE.replace(RETURNED, "carry, inputs"))
    cells.load_cell(f"{path}:Mine")
    with pytest.raises(UserError, match=r"the cell Mine \(.*two.py\): "):
        lstm_jax.load(tmp_path / "two")


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "Mine has no option size: choose from scale, soft": {"model.options": {"size": 3}},
    "options.soft is 'no': it must be of type bool": {"model.options": {"soft": "no"}},
    "Mine has no field dtype: it needs --config.model.dtype=fl": {"model.dtype": "bfloat16"},
    "only the cells lstm, peephole, gru and rnn": {"model.recurrence": "xla"},
    "recurrent_dropout needs a cell with a parameter recurrent_kernel: set it to 0": {
        "regularization.recurrent_dropout": 0.1
    },
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_a_field_that_a_cell_does_not_support_is_one_line(
    message: str, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(SOURCE)
    name_cell(tiny_config, path, "Mine")
    tiny_config.update_from_flattened_dict(UNSUPPORTED[message])
    with pytest.raises(UserError, match=message):
        training.train(tiny_config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cells.CELLS, "block"])
def test_the_cells_of_the_package_follow_the_protocol(name: str) -> None:
    inner = make_cell(cells.import_cell("gru"), 8, 8)
    with jax.enable_x64(True):  # By the caller; it has no effect.
        lstm_jax.check_cell(Block(5, 8, inner) if name == "block" else cells.import_cell(name))


@pytest.mark.slow
def test_cells_in_files_follow_the_protocol(own_file: Path) -> None:
    for name in (f"{own_file}:CoupledLSTM", f"{FOREIGN}:DeltaCell"):
        cells.load_cell(name)
        lstm_jax.check_cell(cells.LOADED[name])
    lstm_jax.check_cell(Sum(5, 8, "bfloat16"))


class Sum(nn.Module):
    """A cell that the tests below break: h' = h / 2 + x W."""

    input_size: int
    hidden_size: int
    dtype: str = "float32"

    def setup(self) -> None:
        shape = (self.input_size, self.hidden_size)
        self.kernel = self.param("kernel", nn.initializers.ones, shape)

    def initial_carry(self, batch_size: int) -> jax.Array:
        return jnp.zeros((batch_size, self.hidden_size))

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = 0.5 * carry + matmul(inputs, self.kernel, self.dtype)
        return carry, carry

    def run_parallel(
        self, carry: jax.Array, inputs: jax.Array, reset: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        outputs = []
        for t in range(inputs.shape[1]):
            carry = reset_carry(self, carry, None if reset is None else reset[:, t])
            carry, output = self(carry, inputs[:, t])
            outputs.append(output)
        return carry, jnp.stack(outputs, axis=1)


def test_a_cell_without_activations_has_a_report_of_its_outputs() -> None:
    class Plain(Sum):
        def setup(self) -> None:  # Its attribute is no method of the protocol.
            super().setup()
            self.activation = jnp.sin

    model = model_lib.LanguageModel(11, 6, 8, cell=Plain)
    params = models.draw_params(model, 0.1)
    ids = np.arange(50, dtype=np.int32) % 11
    reading = page.record_activations(model, params, ids)
    read = jnp.asarray(ids[None]), model.initial_carry(1)
    outputs, _ = model.apply({"params": params}, *read, method="run")
    np.testing.assert_allclose(reading.activations / 127, np.tanh(outputs[0]), atol=0.5 / 127)


def change(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Return a method of `Sum` with the arguments that a function makes of them."""
    return {name: lambda self, *arguments: getattr(Sum, name)(self, *function(self, *arguments))}


step, parallel = (functools.partial(change, name) for name in ("__call__", "run_parallel"))
stop = jax.lax.stop_gradient
# Methods that break a cell, by the message.
BROKEN: dict[str, dict[str, Any]] = {
    "the results of a text depend on the other": step(lambda _, h, x: (h + h.mean(axis=0), x)),
    r"its gradient \(scan\) differs from finite": step(lambda _, h, x: (stop(h), x)),
    r"bfloat16 \(scan\) differ from those in float32": step(
        lambda self, h, x: (h, x if self.dtype == "float32" else x / 2)
    ),
    "the parallel form differs from a scan .*nan": step(lambda _, h, x: (h, x / 0)),
    "the parallel form differs from a scan": parallel(lambda _, h, x, s: (0 * h, x, s)),
    "with documents, two parts of the parallel": parallel(lambda _, h, x, s: (h, x, None)),
    r"its gradient \(auto\) differs from finite differences": parallel(
        lambda _, h, x, reset: (h, x if reset is None else stop(x), reset)
    ),
    r"outputs is float32\[3, 5\]: it must be .* here \[3, 8\]": {
        "__call__": lambda self, h, x: (h, x)
    },
    "TypeError: scan body function carry": {"__call__": lambda self, h, x: ((h, h), h)},
    "the first axis of every array of initial_carry must be the batch": {
        "initial_carry": lambda self, batch_size: jnp.zeros((1, self.hidden_size))
    },
    r"activation is not in \[-1, 1\]": {"activation": lambda self, h: h - 9},
}


@pytest.mark.parametrize("message", BROKEN)
def test_check_cell_names_what_is_wrong(message: str) -> None:
    cell: Any = type("Broken", (Sum,), {"__module__": __name__, **BROKEN[message]})
    place = r"the cell Broken \(.*test_own_cells.py\): "
    with pytest.raises(UserError, match=f"{place}.*{message}") as error:
        lstm_jax.check_cell(cell)
    assert "\n" not in str(error.value)


def test_auto_is_float32_for_a_cell_without_a_dtype(
    own_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{own_file}:CoupledLSTM"
    cells.load_cell(name)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = model_lib.make_model(config_lib.ModelConfig(cell=name, dtype="auto"), 9)
    assert model.dtype == "float32" and model.make_cells()
