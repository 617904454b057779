"""Test batches that are cut on the device."""

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from lstm_jax import batches, config, training
from lstm_jax.devices.feed import feed_batches
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
        feed_batches(ids, complete.batches, 0, mesh, 3, predictions),
        feed_batches(ids, complete.batches, 0, mesh, 3, on_devices=False),
    ]
    for _ in range(steps + 5):
        there, here = map(next, feeds)
        assert there.inputs.dtype == here.inputs.dtype == np.int32
        assert there.soft_targets is not None
        np.testing.assert_array_equal(there.soft_targets.argmax(-1), here.targets)
        for one, other in zip(there[:3], here[:3], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_an_implicit_transfer_to_the_device_raises_an_error(
    tiny_config: ConfigDict, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.zeros(20_000, np.uint8)
    on_host, _ = batches.make_batches(ids, config.complete_config(tiny_config).batches, 0)
    monkeypatch.setattr(training, "feed_batches", lambda *args: on_host)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        training.train(tiny_config, tmp_path)
