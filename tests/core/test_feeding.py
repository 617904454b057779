"""Test batches that are cut on the device, and several steps in one call."""

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from lstm_jax import batches, config, training
from lstm_jax.devices.feed import Feed
from lstm_jax.devices.mesh import make_mesh


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_batches_cut_on_the_devices_are_those_of_the_host(kind: str) -> None:
    fields = config.default()
    fields.batches.kind, fields.batches.batch_size, fields.batches.window_length = kind, 4, 7
    complete = config.complete_config(fields)
    ids = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint16)
    mesh = make_mesh(complete)
    predictions = np.eye(300, dtype=np.float16)[ids]  # Row i is for ids[i].
    _, steps = batches.make_batches(ids, complete.batches, seed=0)
    feeds = [
        Feed(ids, complete, mesh, 3, predictions=predictions),
        Feed(ids, complete, mesh, 3, on_devices=False),
    ]
    for number in (1,) * (steps + 5) + (3,):
        there, here = (feed.next(number) for feed in feeds)
        assert there.inputs.dtype == here.inputs.dtype == np.int32
        assert there.soft_targets is not None
        np.testing.assert_array_equal(there.soft_targets.argmax(-1), here.targets)
        for one, other in zip(there[:3], here[:3], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


@pytest.mark.slow
def test_several_steps_in_one_call_give_the_same_losses(
    tiny_config: ConfigDict, tmp_path: Any
) -> None:
    tiny_config.log_every_steps = 20
    tiny_config.num_epochs = 1
    tiny_config.regularization.output_dropout = 0.1
    training.train(tiny_config, tmp_path / "one")
    tiny_config.steps_per_call = 7  # 20 steps are two calls and six single steps.
    training.train(tiny_config, tmp_path / "several")
    one, several = runs.read_losses(tmp_path / "one"), runs.read_losses(tmp_path / "several")
    assert [row[:2] for row in one] == [row[:2] for row in several]
    np.testing.assert_allclose(
        [row[2] for row in several], [row[2] for row in one], rtol=1e-6, atol=1e-6
    )


def test_an_implicit_transfer_to_the_device_raises_an_error(
    tiny_config: ConfigDict, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_on_host(self: Feed, steps: int = 1) -> Any:
        return next(iter(batches.make_batches(ids, complete.batches, 0)[0]))

    ids, complete = np.zeros(20_000, np.uint8), config.complete_config(tiny_config)
    monkeypatch.setattr(Feed, "next", read_on_host)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        training.train(tiny_config, tmp_path)
