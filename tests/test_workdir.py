from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax import batches, workdir
from lstm_jax import config as config_lib
from lstm_jax.errors import UserError


def test_the_latest_two_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    iterator, _ = batches.make(np.zeros(10_000, np.int32), config_lib.default().batches, 0)
    with workdir.open_checkpoints(tmp_path) as checkpoints:
        losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5}
        for step, loss in losses.items():
            params = {"w": jnp.full(3, float(step))}
            state = {"key": jax.random.key(step), "count": jnp.int32(step)}
            workdir.save(checkpoints, step, params, state, iterator, loss)
        checkpoints.wait_until_finished()
        assert sorted(checkpoints.all_steps()) == [2, 4, 5]
        assert workdir.best_step(checkpoints) == 2
        got, rest = workdir.restore(checkpoints, 2, params, state, iterator)
    np.testing.assert_array_equal(got["w"], np.full(3, 2.0))
    assert int(rest["count"]) == 2
    np.testing.assert_array_equal(
        jax.random.key_data(rest["key"]), jax.random.key_data(jax.random.key(2))
    )


def test_restoring_drops_the_history_written_later(tmp_path: Path) -> None:
    iterator, _ = batches.make(np.zeros(10_000, np.int32), config_lib.default().batches, 0)
    history = tmp_path / workdir.METRICS
    history.write_text("first\n")
    params, state = {"w": jnp.ones(3)}, {"count": jnp.int32(1)}
    with workdir.open_checkpoints(tmp_path) as checkpoints:
        for _ in range(3):
            next(iterator)
        at_save = iterator.get_state()
        workdir.save(checkpoints, 1, params, state, iterator)
        checkpoints.wait_until_finished()
        history.write_text("first\nsecond\n")
        (tmp_path / workdir.SAMPLES).write_text("not there when saved")
        next(iterator)
        workdir.restore(checkpoints, 1, params, state, iterator)
    assert history.read_text() == "first\n"
    assert (tmp_path / workdir.SAMPLES).read_text() == ""
    assert iterator.get_state() == at_save


def test_the_best_of_a_run_is_loaded(trained: Path) -> None:
    loaded = workdir.load(trained)
    assert loaded.step > 0
    assert loaded.params["lstm_0"]["recurrent_kernel"].shape == (24, 96)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="no trained model in .*no config.json"):
        workdir.load(tmp_path)
    (tmp_path / workdir.CONFIG).write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        workdir.load(tmp_path)
    (tmp_path / workdir.CONFIG).write_bytes((trained / workdir.CONFIG).read_bytes())
    with pytest.raises(UserError, match="vocabulary.json is missing or damaged"):
        workdir.load(tmp_path)
    (tmp_path / workdir.VOCABULARY).write_bytes((trained / workdir.VOCABULARY).read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        workdir.load(tmp_path)
