"""Test when a run validates, on what, and when it ends."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import runs
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax import training
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, metrics, workdir
from lstm_jax.run.plan import Plan


class KilledError(Exception):
    """Ends a run without a checkpoint, as SIGKILL does."""


def kill_at(step: int, split: str) -> Callable[[Mapping[str, Any]], None]:
    """Return a callback for `training.train` that ends the run after this row."""

    def watch(row: Mapping[str, Any]) -> None:
        if (row["step"], row["split"]) == (step, split):
            raise KilledError

    return watch


def list_steps(directory: Path, split: str = "validation") -> list[int]:
    return [step for step, name, _ in runs.read_losses(directory) if name == split]


def make_plan(**fields: int) -> Plan:
    return Plan(config_lib.complete_config({"num_epochs": 2, **fields}), 70)


def test_a_plan_validates_within_and_after_epochs_and_at_the_end() -> None:
    def list_validations(plan: Plan) -> list[int]:
        return [step for step in range(plan.total_steps + 1) if plan.validates_at(step)]

    assert list_validations(make_plan()) == [0, 70, 140]
    every = make_plan(validate_every_steps=30)
    assert list_validations(every) == [0, 30, 60, 70, 90, 120, 140]
    assert list_validations(make_plan(validate_every_steps=30, max_steps=101)) == [
        *(0, 30, 60, 70, 90, 101)
    ]
    assert list_validations(make_plan(max_steps=1000)) == [0, 70, 140]


def test_a_run_of_more_steps_than_are_counted_is_refused() -> None:
    with pytest.raises(UserError, match="the run would have 2,450,000,000 steps"):
        Plan(config_lib.complete_config({"num_epochs": 10**6}), 2450)


def test_calls_of_several_steps_end_at_each_log_line_validation_and_the_end() -> None:
    plan = make_plan(steps_per_call=8, log_every_steps=20, validate_every_steps=30, max_steps=101)
    step, ends = 0, {0}
    while step < plan.total_steps:
        step += plan.count_steps_of_call(step)
        ends.add(step)
    assert step == 101
    assert {20, 30, 40, 60, 70, 80, 90, 100, 101} <= ends and len(ends) < 60


@pytest.mark.slow
def test_validating_more_often_does_not_change_training(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.validate_every_steps = 30
    with pytest.raises(KilledError):
        training.train(tiny_config, tmp_path, kill_at(90, "validation"))
    assert training.train(tiny_config, tmp_path) == 0
    assert list_steps(tmp_path) == [0, 30, 60, 70, 90, 120, 140]
    found = runs.read_numbers(tmp_path)
    assert len(set(found)) == len(found), "each step once"
    assert set(runs.read_numbers(trained)) <= set(found)
    samples = (tmp_path / workdir.SAMPLES).read_text()
    assert samples.count("=== step ") == 7 and "=== step 30," in samples


@pytest.mark.slow
def test_max_steps_ends_the_run_and_its_schedule(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.max_steps = 103
    assert training.train(tiny_config, tmp_path) == 0
    assert "=== epoch 1.4714 of 1.4714: validation loss" in capsys.readouterr().out
    assert checkpoints.list_steps(tmp_path / workdir.CHECKPOINTS) == [70, 103]
    rows = metrics.read_metrics(tmp_path / workdir.METRICS)
    (rate,) = [row["learning_rate"] for row in rows if (row["step"], row["split"]) == (60, "train")]
    schedule = optimizer_lib.make_schedule(tiny_config.optimizer, 103)
    assert rate == pytest.approx(float(schedule(59)), rel=1e-5)
    assert training.train(tiny_config, tmp_path) == 0
    output = capsys.readouterr().out
    assert "is finished after 103 steps. To train longer" in output
    assert "--config.max_steps=206" in output
    tiny_config.max_steps = 50
    with pytest.raises(UserError, match=r"trained 103 steps already, and .*max_steps=50 is fewer"):
        training.train(tiny_config, tmp_path)
    tiny_config.max_steps = 0
    assert training.train(tiny_config, tmp_path) == 0
    assert list_steps(tmp_path) == [0, 70, 103, 140]


@pytest.fixture
def patient_config(tiny_config: ConfigDict) -> ConfigDict:
    """Return a config whose validation losses soon stop falling."""
    tiny_config.optimizer.learning_rate = 0.2
    tiny_config.optimizer.schedule = "constant"
    tiny_config.validate_every_steps = 15
    tiny_config.num_epochs, tiny_config.patience = 20, 3
    return tiny_config


@pytest.mark.slow
def test_patience_ends_a_run_at_the_same_step_whether_or_not_it_was_killed(
    patient_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert training.train(patient_config, whole) == 0
    output = capsys.readouterr().out
    losses = {s: loss for s, split, loss in runs.read_losses(whole) if split == "validation"}
    *_, before, last = steps = list(losses)
    best = min(losses, key=losses.__getitem__)
    assert last < 1400 and steps.index(last) - steps.index(best) == 3
    assert (
        f"Training ends at step {last} of 1400: the validation loss has not improved for 3 "
        "validations\n"
    ) in output
    assert f"Test loss at step {best}, the step with the best validation loss" in output
    assert list_steps(whole, "test") == [best]

    # Before a validation, and during the last one, whose loss is lost.
    for step, split in ((before // 10 * 10, "train"), (last, "validation")):
        with pytest.raises(KilledError):
            training.train(patient_config, killed, kill_at(step, split))
    assert training.train(patient_config, killed) == 0
    runs.assert_same(whole, killed)

    # It is finished, and more patience resumes it.
    content, saved = ((whole / name).read_bytes() for name in (workdir.METRICS, workdir.CONFIG))
    capsys.readouterr()
    changed = patient_config.copy_and_resolve_references()
    changed.optimizer.weight_decay = 0.5
    assert training.train(changed, whole) == 0
    output = capsys.readouterr().out
    assert (whole / workdir.CONFIG).read_bytes() == saved, "it was not trained with another one"
    assert "weight_decay" not in output and not (whole / workdir.CHANGES).exists()
    assert (
        "epochs: the validation loss has not improved for 3 validations. To train longer" in output
    )
    assert "--config.patience=6" in output
    assert (whole / workdir.METRICS).read_bytes() == content
    patient_config.patience, patient_config.max_steps = 0, last + 5
    assert training.train(patient_config, whole) == 0
    assert list_steps(whole)[: len(steps)] == steps and list_steps(whole)[-1] == last + 5


@pytest.mark.slow
def test_validation_reads_the_first_tokens_only(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.max_steps, tiny_config.validation_tokens = 20, 300
    assert training.train(tiny_config, tmp_path) == 0
    trained = workdir.load_trained(tmp_path)
    text = Path(tiny_config.data.path).read_text(encoding="utf-8")
    ids = trained.vocabulary.encode(text[18_000:18_300])
    losses = {step: loss for step, name, loss in runs.read_losses(tmp_path) if name == "validation"}
    expected = loss_lib.compute_loss(trained.model, trained.params, ids)
    assert losses[20] == pytest.approx(expected, rel=1e-6)
    tiny_config.validation_tokens = 0
    with pytest.raises(UserError, match="validation_tokens was 300 and is 0"):
        training.train(tiny_config, tmp_path)
    tiny_config.validation_tokens = 1
    with pytest.raises(UserError, match="validation_tokens is 1: it needs"):
        training.train(tiny_config, tmp_path / "other")
