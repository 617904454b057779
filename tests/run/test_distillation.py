"""Test training on the probabilities of teachers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import commands
import lstm_jax
import models
import runs
from lstm_jax import config as config_lib
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax import train_step, training
from lstm_jax.run import distillation, workdir


def test_the_gradient_is_that_of_text_and_teachers() -> None:
    """Compare a step of SGD with the gradient of the mixed cross-entropy, by the softmax."""
    config = config_lib.complete_config({"distill": {"weight": 0.75}, "batches": {"batch_size": 2}})
    model = model_lib.LanguageModel(11, 6, 9)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, (2, 8)).astype(np.int32)
    soft_targets = rng.dirichlet(np.ones(11), (2, 7)).astype(np.float16)
    params = models.draw_params(model)
    grads: Any = []
    for soft, hard_share in ((soft_targets, 0.25), (None, 1.0)):
        compute = train_step._make_compute_grads(model, config)
        batch, carry = (ids[:, :-1], ids[:, 1:], soft), model.initial_carry(2)
        arguments = jax.random.key(0), jax.tree.map(jnp.asarray, batch), carry, [None, None]
        (gradient, loss), _ = compute(params, *arguments)
        logits, _ = models.apply(model, params, batch[0], carry)
        probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
        hard = np.eye(11)[batch[1]]
        mixed = hard_share * hard + (1 - hard_share) * soft_targets.astype(np.float64)
        # The gradient of the dense layer's bias is the mean of what is predicted too much.
        expected = (probabilities - mixed).mean(axis=(0, 1))
        np.testing.assert_allclose(gradient["dense"]["bias"], expected, atol=2e-4)
        # The recorded loss is that of the text alone.
        assert float(loss) == pytest.approx(-np.log(probabilities[hard == 1]).mean(), rel=1e-5)
        grads.append(gradient)
    assert not np.allclose(*(g["embedding"]["embedding"] for g in grads))


def test_teachers_predict_each_token_from_the_text_before(trained: Path) -> None:
    config, vocabulary = workdir.load_config(trained), workdir.load_vocabulary(trained)
    config = config_lib.complete_config(config, {"distill.teachers": f"{trained},{trained}"})
    length = loss_lib.LONGEST_IN_ONE + 500  # Read as streams.
    ids = np.random.default_rng(0).integers(2, len(vocabulary), length).astype(np.int32)
    for of_text in (ids, ids[:300]):
        predictions = distillation.predict_text(config, vocabulary, of_text)
        assert predictions.dtype == np.float16
        assert predictions.shape == (len(of_text), len(vocabulary))
        np.testing.assert_array_equal(predictions[0], np.eye(len(vocabulary))[of_text[0]])
        model = lstm_jax.load(trained)
        losses = loss_lib.compute_token_losses(model.model, model.params, of_text)
        chosen = predictions[np.arange(1, len(of_text)), of_text[1:]].astype(np.float64)
        np.testing.assert_allclose(chosen, np.exp(-losses), atol=1e-3)


def test_teachers_of_another_text_give_a_warning(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, vocabulary = workdir.load_config(trained), workdir.load_vocabulary(trained)
    changes, ids = {"distill.teachers": str(trained)}, np.full(20, 2)
    distillation.predict_text(config_lib.complete_config(config, changes), vocabulary, ids)
    assert capsys.readouterr().err == ""
    changes["data.sha256"] = "0:9:5:5"
    distillation.predict_text(config_lib.complete_config(config, changes), vocabulary, ids)
    assert "read another text or other splits" in capsys.readouterr().err


def test_a_student_that_starts_from_a_model_has_the_tokens_of_its_teachers(
    trained: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("¿" + text_file.read_text(encoding="utf-8"), encoding="utf-8")
    changes = {"init_from": str(trained), "distill.teachers": f"{trained},{trained}"}
    changes |= {"data.path": str(tmp_path / "a.txt"), "data.sha256": ""}
    config = config_lib.complete_config(workdir.load_config(trained), changes)
    with pytest.raises(runs.KilledError):
        training.train(config, tmp_path / "run", runs.kill_at(0, "validation"), quiet=True)
    fields = workdir.load_vocabulary(tmp_path / "run").to_fields()
    assert fields == workdir.load_vocabulary(trained).to_fields()


@pytest.mark.slow
def test_a_student_resumes_bit_for_bit(
    trained: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--config.distill.teachers={trained}", "--config.distill.weight=0.9"]
    states = []
    for name, stops in (("whole", [9]), ("resumed", [4, 9])):
        for stop in stops:
            arguments = runs.make_arguments(text_file, tmp_path / name, *flags)
            commands.get_output("main", *arguments, f"--config.max_steps={stop}")
        states.append(runs.load_final_state(tmp_path / name))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)

    def take_step(state: Any, batch: Any) -> None:
        raise ZeroDivisionError(batch.soft_targets.shape)

    longer = config_lib.complete_config(workdir.load_config(tmp_path / "whole"), {"max_steps": 10})
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError, match=r"\(8, 32, "):
        patched.setattr(training, "make_train_step", lambda *args: take_step)
        training.train(longer, tmp_path / "whole")
    arguments = runs.make_arguments(text_file, tmp_path / "bytes", flags[0])
    result = commands.run("main", *arguments, "--config.data.units=bytes")
    assert result.returncode == 2
    assert "is not that of this run" in result.stderr
