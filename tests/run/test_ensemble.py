"""Test that an ensemble predicts the mean probabilities of its members."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import commands
import lstm_jax
import models
from lstm_jax import config as config_lib
from lstm_jax import dynamic, ensemble, generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import transfer
from lstm_jax.errors import UserError
from lstm_jax.generation import Controls
from lstm_jax.model import LanguageModel
from lstm_jax.run import workdir
from lstm_jax.vocabulary import Vocabulary

SETTINGS = dynamic.Settings(learning_rate=0.01, decay=0.05, segment_length=7)


# Of different sizes and cells. Large weights make the distributions far from uniform.
MODELS = LanguageModel(11, 4, 12, 2), LanguageModel(11, 5, 7, cell="gru")
PARAMS = tuple(models.draw_params(model, 0.6) for model in MODELS)
MEMBERS = [*zip(MODELS, PARAMS, strict=True)]
JOINED: tuple[Any, Any] = ensemble.Ensemble(MODELS), PARAMS


def make_ids(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(2, 11, length).astype(np.int32)


def compute_probabilities(ids: np.ndarray) -> np.ndarray:
    """Return the mean probabilities of the next token after each id, float64 [n, vocabulary]."""
    log_probs = [models.compute_log_probs(model, params, ids) for model, params in MEMBERS]
    mean: np.ndarray = np.mean(np.exp(log_probs), axis=0)
    return mean


def test_the_loss_is_that_of_the_mean_probabilities() -> None:
    ids = make_ids(300)
    expected = -np.log(compute_probabilities(ids[:-1])[np.arange(299), ids[1:]])
    losses = loss_lib.compute_token_losses(*JOINED, ids)
    np.testing.assert_allclose(losses, expected, atol=1e-4)


def test_a_step_predicts_the_mean_probabilities() -> None:
    model, params = JOINED
    ids = make_ids(40)
    arrays = generation.prepare_params(model, params)
    state = generation.read_tokens(
        model, arrays, generation.initial_state(model, arrays), ids[None]
    )
    np.testing.assert_allclose(
        np.exp(state.logits[0]), compute_probabilities(ids)[-1], rtol=1e-4, atol=1e-6
    )
    greedy = models.generate_tokens(
        model, params, ids[None], jax.random.key(0), Controls(temperature=0), length=20
    )
    probabilities = compute_probabilities(np.append(ids, greedy))[39:-1]
    np.testing.assert_array_equal(greedy[0], probabilities[:, 2:].argmax(axis=-1) + 2)


def test_each_member_adapts_on_its_own_loss() -> None:
    train_ids, ids, probabilities = make_ids(50), make_ids(90), np.zeros(89)
    for model, params in MEMBERS:
        sizes = dynamic.measure_gradient_sizes(model, params, train_ids, 7)
        own = dynamic.compute_dynamic_losses(model, params, ids, SETTINGS, sizes)
        probabilities += np.exp(-own.astype(np.float64)) / len(MEMBERS)
    losses = dynamic.adapt_to_text(MEMBERS, train_ids, ids, SETTINGS)
    np.testing.assert_allclose(losses, -np.log(probabilities), atol=1e-5)


def make_run(trained: Path, directory: Path, changes: dict[str, Any]) -> Path:
    """Make a working directory like another one, with fields of its config changed."""
    loaded = lstm_jax.load(trained)
    config = config_lib.complete_config(loaded.config, changes)
    params = models.draw_params(model_lib.make_model(config.model, len(loaded.vocabulary)))
    transfer.make_folder(directory, config, loaded.vocabulary, params)
    return directory


@pytest.mark.slow
def test_several_runs_are_one_model(trained: Path, tmp_path: Path) -> None:
    other = make_run(trained, tmp_path / "other", {"model.cell": "gru", "model.hidden_size": 16})
    result = commands.run("evaluate", f"--workdir={trained}", f"--workdir={other}")
    loaded = lstm_jax.load([trained, other])
    assert json.loads(result.stdout)["step"] == loaded.step
    ids = generation.encode_prompt(loaded.vocabulary, "")
    carry = loaded.model.initial_carry(1)
    logits, _ = models.apply(loaded.model, loaded.params, ids[None], carry)
    best = int(logits[0, -1].argmax())
    assert str(loaded).startswith("<lstm_jax.Run: lstm 1x24, gru 1x16; ")
    with pytest.raises(UserError, match="an ensemble has no hidden states"):
        loaded.hidden_states("A")
    ((token, probability),) = loaded.next("", n=1)
    assert token == loaded.vocabulary.tokens[best]
    assert probability == pytest.approx(np.exp(logits[0, -1, best]), abs=1e-5)


@pytest.mark.slow
def test_members_need_one_text_and_vocabulary(trained: Path, tmp_path: Path) -> None:
    for changes in ({"data.sha256": "0" * 64}, {}):
        run = make_run(trained, tmp_path / str(len(changes)), changes)
        if not changes:
            *tokens, last = workdir.load_vocabulary(run).tokens
            other = Vocabulary([*tokens, last + "\u0301"], "words")
            workdir.save_fields(run, workdir.load_config(run), other)
        with pytest.raises(UserError, match=f"{trained} and {run} have different texts"):
            lstm_jax.load([trained, run])
