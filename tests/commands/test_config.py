"""Test that experiments are complete, and that errors name the fields of a config."""

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from ml_collections import ConfigDict

import commands
from lstm_jax import cells, optimizer
from lstm_jax import config as config_lib
from lstm_jax.errors import UserError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_complete_and_survives_json(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_lib.complete_config(module.get_config())
    assert config_lib.complete_config(json.loads(json.dumps(config.to_dict()))) == config
    assert f"--config experiments/{path.name}" in path.read_text(encoding="utf-8")


def test_the_tables_of_the_config_are_those_of_the_code() -> None:
    assert tuple(cells.CELLS) == config_lib.CELLS
    assert tuple(optimizer.OPTIMIZERS) == get_args(config_lib.OptimizerName)


def test_the_default_config_is_the_lesson() -> None:
    # experiments/shakespeare.py states these defaults.
    config = config_lib.default()
    assert (config.batches.kind, config.batches.batch_size) == ("windows", 64)
    assert (config.batches.window_length, config.num_epochs) == (100, 20)
    assert config.optimizer.learning_rate == 1e-4
    assert (config.model.embedding_size, config.model.hidden_size) == (256, 1024)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"hiden_size": 7}}, "model.hiden_size: did you mean model.hidden_size"),
        ({"modle": {}}, "there is no field config.modle"),
        ({"seed": {}}, "config.seed is {}: it must be of type int"),
        ({"model": {"hidden_size": "7"}}, "model.hidden_size is '7': it must be of type int"),
        ({"model": {"hidden_size": 0}}, "model.hidden_size is 0: it must be from 1 to 1,048,576"),
        ({"max_step": 1}, "config.max_step: did you mean max_steps"),
        ({"data": {"batch_size": 1}}, "data.batch_size: did you mean batches.batch_size"),
        ({"seed": 2**32}, "seed is 4294967296: it must be from 0 to 4,294,967,295"),
        ({"model": 5}, "no field config.model"),
        (
            {"batches": {"kind": "stream"}},
            "batches.kind is 'stream': it must be one of windows, streams",
        ),
        ({"data": {"fractions": (0.9, 0.2, 0.1)}}, "data.fractions is .* add up to 1"),
        ({"data": {"fractions": (1.0,)}}, "data.fractions"),
        ({"optimizer": {"name": "schedule_free", "b1": 0.0}}, "b1 is 0.0: .* above 0 for"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate is nan"),
        ({"data": {"units": "letters"}}, "data.units is 'letters': it must be one of char"),
        ({"data": {"document_separator": "page"}}, "must be empty or one of line, blank_line"),
        ({"optimizer": {"microbatches": 3}}, "it must be a divisor of batches.batch_size"),
        ({"mesh": {"data": 5}}, "batches.batch_size is 64: it must be a multiple of mesh.data"),
        ({"steps_per_call": 11}, "steps_per_call is 11: it must be at most log_every_steps"),
        (
            {"model": {"skip_connections": True, "tie_embeddings": True}},
            "skip_connections is True: it must be False with tie_embeddings, unless",
        ),
        (None, "the config is a NoneType"),
        ({5: 3}, "this is not a config"),
    ],
)
def test_an_error_names_a_bad_field(fields: dict[Any, object] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_lib.complete_config(fields if fields is None else ConfigDict(fields))


def test_docs_config_md_is_up_to_date() -> None:
    page = commands.run("config").stdout
    assert page == (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), (
        "update it with: python -m lstm_jax.config > docs/config.md"
    )
    for field in config_lib.FIELDS:
        mark = " [resume]" if field.resume else ""
        assert f"\n- `--config.{field.name}={field.default!r}`{mark}\n" in page


def test_defaults_are_valid() -> None:
    config = config_lib.default()
    assert config_lib.complete_config(config) == config_lib.Config()
    assert config_lib.Config().to_dict() == config.to_dict()
    assert config_lib.find_unused_fields(config) == []
    assert {name for name, _ in config_lib.flatten(config)} == {f.name for f in config_lib.FIELDS}
    assert all(field.meaning.endswith(".") for field in config_lib.FIELDS)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"regularization.hidden_dropout": 0.5}, {"model.num_layers": 2}),
        ({"model.skip_connections": True}, {"model.num_layers": 2}),
        ({"model.hidden_size": 9, "model.tie_embeddings": True}, {"model.num_layers": 2}),
        ({"optimizer.momentum": 0.5}, {"optimizer.name": "sgd"}),
        ({"optimizer.step_at": (0.1, 0.2)}, {"optimizer.schedule": "step"}),
        ({"batches.reset_probability": 0.5}, {"batches.kind": "streams"}),
        ({"model.rematerialize": 4000}, {"batches.window_length": 4001}),
        ({"data.dataset": "other", "data.path": "my.txt"}, {"data.path": ""}),
    ],
)
def test_a_field_without_effect_is_found(fields: dict[str, Any], needed: dict[str, Any]) -> None:
    config = config_lib.default()
    config.update_from_flattened_dict(fields)
    (message,) = config_lib.find_unused_fields(config)
    assert message.startswith(f"config.{next(iter(fields))} is ")
    assert next(iter(needed)).rpartition(".")[2] in message
    config.update_from_flattened_dict(needed)
    assert config_lib.find_unused_fields(config) == []
