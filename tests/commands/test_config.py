"""Test the fields of a config, the messages about mistakes in them, and the experiments."""

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import commands
from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.errors import UserError
from lstm_jax.run import workdir

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_complete_and_survives_json(path: Path) -> None:
    config = config_lib.complete_config(config_lib.load(str(path)))
    assert config_lib.complete_config(json.loads(json.dumps(config.to_dict()))) == config
    assert f"--config experiments/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["penn_treebank", "penn_treebank_words"])
def test_an_experiment_that_no_page_runs_trains_and_resumes(
    name: str, text_file: Path, tmp_path: Path
) -> None:
    config = config_lib.load(str(ROOT / "experiments" / f"{name}.py"))
    config.model.hidden_size = config.model.embedding_size = 16
    config.batches.batch_size, config.batches.window_length = 8, 32
    config.data.path, config.sample.length = str(text_file), 20
    every = config.log_every_steps
    for config.max_steps in (every, 2 * every):
        training.train(config, tmp_path)
    rows = workdir.read_metrics(tmp_path)
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def test_the_default_config_is_the_lesson() -> None:
    # experiments/shakespeare.py states these defaults.
    config = config_lib.default()
    assert (config.batches.kind, config.batches.batch_size) == ("windows", 64)
    assert (config.batches.window_length, config.num_epochs) == (100, 20)
    assert config.optimizer.learning_rate == 1e-4
    assert (config.model.embedding_size, config.model.hidden_size) == (256, 1024)
    assert config_lib.complete_config(config) == config_lib.Config()
    assert [name for name, _ in config_lib.flatten(config_lib.Config())] == [*config_lib.FIELDS]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"hiden_size": 7}}, "no field model.hiden_size: did you mean model.hidden_size"),
        ({"seed": {}}, "config.seed is {}: it must be of type int"),
        ({"seed": True}, "config.seed is True: it must be of type int"),
        ({"model": {"hidden_size": "7"}}, "model.hidden_size is '7': it must be of type int"),
        ({"model": {"hidden_size": 0}}, "size is 0: it needs 1 <= hidden_size <= 2**20"),
        ({"data": {"batch_size": 1}}, "data.batch_size: did you mean batches.batch_size"),
        ({"model": 5}, "no field model"),
        ({"batches": {"kind": "stream"}}, "it must be one of windows, streams"),
        ({"data": {"fractions": (0.9, 0.2, 0.1)}}, "abs(sum(fractions) - 1) < 1e-6"),
        ({"data": {"fractions": ("a", "b", "c")}}, "data.fractions is ('a', 'b', 'c')"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate is nan"),
        ({"optimizer": {"name": "adamw"}}, "it must be one of adam, muon, sgd"),
        ({"model": {"cell": "gur"}}, "mlstm, FILE.py:CLASS"),
        ({"mesh": {"data": 5}}, "batches.batch_size is 64: it needs batches.batch_size % "),
        (None, "the config is a NoneType"),
    ],
)
def test_an_error_names_a_bad_field(fields: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        config_lib.complete_config(fields if fields is None else ConfigDict(fields))
    assert message in str(error.value)


DROPOUTS = "embedding_dropout input_dropout hidden_dropout output_dropout recurrent_dropout"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("dropout", " or ".join(f"regularization.{name}" for name in DROPOUTS.split())),
        ("hidden", "model.hidden_size"),
        ("context", "batches.window_length"),
        ("epochs", "num_epochs"),
    ],
)
def test_a_field_is_found_by_the_names_that_people_use(name: str, fields: str) -> None:
    result = commands.run("main", f"--config.{name}=1", "--config=experiments/quick.py", cwd=ROOT)
    assert result.returncode == 2
    meant = " or ".join(f"--config.{field}" for field in fields.split(" or "))
    assert result.stderr == f"error: there is no flag --config.{name}: did you mean {meant}?\n"


def test_docs_config_md_is_up_to_date() -> None:
    page = commands.run("config").stdout
    assert page == (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), (
        "update it with: python -m lstm_jax.config > docs/config.md"
    )
    for field in config_lib.FIELDS.values():
        mark = " [resume]" if field.resume else ""
        assert (f"\n- `--config.{field.name}={field.default!r}`{mark}: " in page) == field.is_flag
        assert field.meaning.endswith(".")


BAD_EXPERIMENTS = {
    "raises.py": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "syntax.py": ("def get_config(:\n", "(syntax.py, line 1)"),
    "empty.py": ("", "empty.py: KeyError: 'get_config'"),
    "words.py:gru": ("def get_config(word): raise ValueError(word)\n", "line 1: ValueError: gru"),
    "12:30/none.py": (None, "there is no config file 12:30/none.py"),
}


@pytest.mark.parametrize("name", BAD_EXPERIMENTS)
def test_a_mistake_in_an_experiment_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = BAD_EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name.partition(":")[0]).write_text(content)
    with pytest.raises(UserError) as error:
        config_lib.load(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_experiment_is_read_from_the_package_only_if_no_file_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An installed package has experiments/ within it, and an editable one beside it.
    monkeypatch.chdir(tmp_path)
    for parent in (tmp_path / "installed" / "lstm_jax", tmp_path / "clone"):
        experiments = parent / "experiments"
        experiments.mkdir(parents=True)
        (experiments / "helper.py").write_text("WIDTH = 7")
        (experiments / "quick.py").write_text(
            "def get_config(word):\n    from helper import WIDTH\n    return word, WIDTH"
        )
        package = parent if parent.name == "lstm_jax" else parent / "lstm_jax"
        monkeypatch.setattr(config_lib, "__file__", str(package / "config.py"))
        file = config_lib.find_experiment("experiments/quick.py")
        assert file == str(experiments / "quick.py")
        assert config_lib.load("experiments/quick.py:gru") == ("gru", 7)
        for other in ("experiments/none.py", "quick.py", "elsewhere/experiments/quick.py"):
            assert config_lib.find_experiment(other) == other
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quick.py").write_text("")
    assert config_lib.find_experiment("experiments/quick.py") == "experiments/quick.py"
