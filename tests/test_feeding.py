from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from lstm_jax import batches, config, training
from lstm_jax.devices import feeding, parallel
from lstm_jax.errors import UserError


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_a_text_on_the_device_gives_the_batches_of_the_pipeline(kind: str) -> None:
    fields = config.default()
    fields.batches.kind, fields.batches.batch_size, fields.batches.window_length = kind, 4, 7
    ids = np.random.default_rng(0).integers(0, 300, 1000).astype(np.int32)
    pipeline, steps = batches.make_batches(ids, fields.batches, seed=3)
    offsets, _ = batches.make_batches(ids, fields.batches, seed=3, only_offsets=True)
    mesh = parallel.make_mesh(fields)
    predictions = jnp.asarray(np.eye(300, dtype=np.float16)[ids])  # Row i is for ids[i].
    feed = feeding.Feed(offsets, mesh, feeding.place_text(ids, 300, mesh), predictions)
    whole = feeding.Feed(batches.make_batches(ids, fields.batches, seed=3)[0], mesh, None)
    for _ in range(2 * steps + 5):
        expected, resident, put = next(pipeline), feed.next(), whole.next()
        assert isinstance(resident, feeding.Resident) and resident.ids.dtype == np.uint16
        cut = batches.cut_batch(resident.ids, resident.offsets, 7, resident.predictions)
        assert cut.soft_targets is not None
        np.testing.assert_array_equal(cut.soft_targets.argmax(-1), expected.targets)
        jax.tree.map(np.testing.assert_array_equal, cut._replace(soft_targets=None), expected)
        jax.tree.map(np.testing.assert_array_equal, put, expected)
    several = feed.next(3)
    assert isinstance(several, feeding.Resident) and several.offsets.begins.shape == (3, 4)


@pytest.mark.slow
def test_several_steps_in_one_call_give_the_same_losses(
    tiny_config: ConfigDict, tmp_path: Any
) -> None:
    tiny_config.log_every_steps = 20
    tiny_config.num_epochs = 1
    tiny_config.regularization.output_dropout = 0.1
    assert training.train(tiny_config, tmp_path / "one") == 0
    tiny_config.steps_per_call = 7  # 20 steps are two calls and six single steps.
    assert training.train(tiny_config, tmp_path / "several") == 0
    one, several = runs.read_losses(tmp_path / "one"), runs.read_losses(tmp_path / "several")
    assert [row[:2] for row in one] == [row[:2] for row in several]
    np.testing.assert_allclose(
        [row[2] for row in several], [row[2] for row in one], rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
def test_an_error_names_the_nonfinite_step_among_several(
    tiny_config: ConfigDict, tmp_path: Any
) -> None:
    tiny_config.optimizer.learning_rate = 8e17  # Twice this value overflows.
    tiny_config.optimizer.warmup_steps = 0
    tiny_config.optimizer.max_gradient_norm = 0.0
    tiny_config.steps_per_call = 5
    with pytest.raises(UserError, match="gradient of step 2 is not finite"):
        training.train(tiny_config, tmp_path)
    assert (tmp_path / "nonfinite_step_2.json").exists()


def test_an_implicit_transfer_to_the_device_raises_an_error(
    tiny_config: ConfigDict, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skip_placement(self: feeding.Feed, read: list[Any]) -> Any:
        return read[0]

    monkeypatch.setattr(feeding.Feed, "_place", skip_placement)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        training.train(tiny_config, tmp_path)
