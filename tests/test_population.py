import json
import math
import runpy
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ml_collections import ConfigDict

import runs
from conftest import make_once, make_tiny_config
from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.data import texts
from lstm_jax.errors import UserError
from lstm_jax.run import metrics, workdir
from lstm_jax.sweep import options, population, stacked
from lstm_jax.sweep import space as space_lib

# Fields of every kind vary, and the schedule.
MEMBERS: list[dict[str, Any]] = [
    {
        "optimizer.learning_rate": 0.005,
        "optimizer.warmup_steps": 0,
        "optimizer.schedule": "linear",
        "regularization.output_dropout": 0.4,
        "optimizer.average_decay": 0.9,
    },
    {
        "seed": 1,
        "model.initial_scale": 0.5,
        "model.initial_embedding": 0.3,
        "optimizer.b1": 0.8,
        "optimizer.b2": 0.99,
        "optimizer.epsilon": 1e-4,
        "optimizer.schedule": "step",
        "optimizer.weight_decay": 0.3,
        "optimizer.max_gradient_norm": 0.0,
        "regularization.embedding_dropout": 0.1,
        "regularization.input_dropout": 0.1,
        "regularization.recurrent_dropout": 0.2,
        "regularization.activation_penalty": 0.5,
        "regularization.temporal_activation_penalty": 0.3,
    },
]


def read_losses(directory: Path) -> dict[tuple[str, int], float]:
    rows = metrics.read_metrics(directory / workdir.METRICS)
    return {(row["split"], row["step"]): row["loss"] for row in rows}


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path
) -> tuple[list[config_lib.Config], list[Path], list[str], list[tuple[int, int]]]:
    """Train three members at once, the last of which diverges."""
    diverges: dict[str, Any] = {"optimizer.learning_rate": 1e30, "optimizer.max_gradient_norm": 0.0}
    tiny = make_tiny_config(text_file)
    tiny.validate_every_steps, tiny.validation_tokens = 40, 300
    config = config_lib.complete_config(tiny)
    configs = [config_lib.change_fields(config, changes) for changes in [*MEMBERS, diverges]]

    def list_directories(root: Path) -> list[Path]:
        return [root / str(i) for i in range(len(configs))]

    def make(root: Path) -> None:
        validated: list[tuple[int, int]] = []

        def watch(member: int, row: metrics.Row) -> None:
            if row["split"] == "validation":
                validated.append((member, row["step"]))

        reasons = population.train_population(configs, list_directories(root), watch)
        (root / "results.json").write_text(json.dumps([reasons, validated]))

    root = make_once("population", tmp_path_factory, make)
    reasons, validated = json.loads((root / "results.json").read_text())
    return configs, list_directories(root), reasons, [tuple(pair) for pair in validated]


@pytest.mark.slow
def test_each_member_matches_a_single_run(together: tuple, tmp_path: Path) -> None:
    configs, directories, reasons, validated = together
    assert reasons[:2] == ["", ""]
    for i, (config, directory) in enumerate(zip(configs[:2], directories, strict=False)):
        alone = tmp_path / str(i)
        assert training.train(config, alone) == 0
        for (*row, number), (*other, expected) in zip(
            runs.read_numbers(directory), runs.read_numbers(alone), strict=True
        ):
            assert row == other and number == pytest.approx(expected, abs=1e-4, rel=1e-4), (i, row)
        assert [step for member, step in validated if member == i] == [0, 40, 70, 80, 120, 140]


@pytest.mark.slow
def test_a_diverged_member_is_reported_and_does_not_affect_others(together: tuple) -> None:
    _, directories, reasons, validated = together
    assert "is not finite" in reasons[2]
    assert ("test", 140) not in read_losses(directories[2])
    assert [step for member, step in validated if member == 2] == [0]


@pytest.mark.slow
def test_members_killed_at_different_epochs_end_with_the_same_losses(
    together: tuple, tmp_path: Path
) -> None:
    configs, directories, _, _ = together
    copies = [tmp_path / str(i) for i in range(2)]
    for directory, copy in zip(directories, copies, strict=False):
        shutil.copytree(directory, copy)
    shutil.rmtree(copies[1] / workdir.CHECKPOINTS / "140")
    assert population.train_population(configs[:2], copies, lambda *row: None) == ["", ""]
    for directory, copy in zip(directories, copies, strict=False):
        expected, found = read_losses(directory), read_losses(copy)
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_members_share_one_vocabulary(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = type(texts.load_texts(tiny_config.data).texts["train"])
    learn = mock.Mock(side_effect=text.vocabulary)
    monkeypatch.setattr(text, "vocabulary", lambda *given: learn(*given))
    tiny_config.log_every_steps, tiny_config.max_steps = 1, 3
    directories = [tmp_path / "0", tmp_path / "1"]
    configs = [config_lib.complete_config(tiny_config)] * 2
    population.train_population(configs, directories, lambda *row: None)
    assert learn.call_count == 1
    rows = metrics.read_metrics(directories[1] / workdir.METRICS)
    trained = [row for row in rows if row["split"] == "train"]
    assert ["tokens_per_second" in row for row in trained] == [False, True, True]


def test_members_that_differ_in_other_fields_raise_an_error(tiny_config: ConfigDict) -> None:
    config = config_lib.complete_config(tiny_config)
    other = config_lib.change_fields(config, {"model.hidden_size": 32})
    with pytest.raises(UserError, match="can't differ in config.model.hidden_size"):
        population.check_members([config, other])
    patient = config_lib.change_fields(config, {"patience": 2})
    with pytest.raises(UserError, match=r"leave out --config.patience, or .*--population=1"):
        population.check_members([patient, patient])


def test_hyperparameters_that_vary_are_stacked(tiny_config: ConfigDict) -> None:
    config = config_lib.complete_config(tiny_config)
    other = config_lib.change_fields(
        config,
        {
            "seed": 1,
            "optimizer.warmup_steps": 3,
            "optimizer.schedule": "linear",
            "optimizer.max_gradient_norm": 0.0,
        },
    )
    varied = stacked.stack_hyperparameters([config, other], stacked.make_mesh(1))
    assert {name: array.tolist() for name, array in varied.items()} == {
        "optimizer.warmup_steps": [10, 3],
        "optimizer.schedule": [1, 2],
        "optimizer.max_gradient_norm": [1.0, math.inf],
    }
    values = dict(config_lib.flatten(config))
    strings = [name for name in options.TRACED_BY_STEP if isinstance(values[name], str | bool)]
    assert strings == ["optimizer.schedule"], "the others can be arrays"


def test_the_population_space_varies_only_allowed_fields() -> None:
    root = Path(__file__).parents[1] / "experiments"
    experiment = config_lib.complete_config(runpy.run_path(str(root / "quick.py"))["get_config"]())
    drawn, parameters = space_lib.load_space(root / "sweeps" / "population.py").check(experiment)
    population.check_members(drawn)
    assert len(parameters) >= 10
