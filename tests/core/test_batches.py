"""Test how windows and streams cut a text into batches."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from lstm_jax import batches
from lstm_jax.errors import UserError


def fields(kind: str, batch_size: int, window_length: int) -> ConfigDict:
    return ConfigDict({"kind": kind, "batch_size": batch_size, "window_length": window_length})


def test_windows_are_reshuffled_each_epoch_and_cover_the_text_once() -> None:
    ids = np.arange(1000, dtype=np.int32)  # Each id is its own position.
    iterator, steps = batches.make_batches(ids, fields("windows", 4, 10), seed=1)
    assert steps == 24  # 99 windows, 4 in each batch.
    epochs = []
    for _ in range(2):
        epoch = [next(iterator) for _ in range(steps)]
        for batch in epoch:
            assert batch.inputs.shape == batch.targets.shape == (4, 10)
            assert batch.inputs.dtype == batch.targets.dtype == np.int32
            assert batch.starts
            np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
        epochs.append(np.concatenate([batch.inputs for batch in epoch]))
    for windows in epochs:
        starts = windows[:, 0]
        assert (starts % 10 == 0).all() and len(set(starts.tolist())) == 96
        assert not (np.diff(starts) > 0).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_streams_are_contiguous_and_shift_every_epoch() -> None:
    ids = np.arange(1000, dtype=np.int32)
    iterator, steps = batches.make_batches(ids, fields("streams", 4, 10), seed=1)
    assert steps == 24  # (1000 - 10) // 40
    first_positions = []
    for _ in range(6):
        epoch = [next(iterator) for _ in range(steps)]
        assert [bool(batch.starts) for batch in epoch] == [True] + [False] * (steps - 1)
        streams = np.concatenate([batch.inputs for batch in epoch], axis=1)
        np.testing.assert_array_equal(np.diff(streams), 1)
        np.testing.assert_array_equal(np.diff(streams[:, 0]), steps * 10)
        for batch in epoch:
            np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
        first_positions.append(int(streams[0, 0]))
    assert len(set(first_positions)) > 1


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_an_iterator_starts_at_any_step(kind: str) -> None:
    ids = np.random.default_rng(0).integers(0, 50, 2000).astype(np.int32)
    iterator, steps = batches.make_batches(ids, fields(kind, 3, 7), seed=5)
    for _ in range(steps + 3):
        next(iterator)
    expected = [next(iterator) for _ in range(5)]
    other, _ = batches.make_batches(ids, fields(kind, 3, 7), seed=5, first_step=steps + 3)
    for batch in expected:
        for a, b in zip(batch, next(other), strict=True):
            np.testing.assert_array_equal(a, b)
    another, _ = batches.make_batches(ids, fields(kind, 3, 7), seed=6, first_step=steps + 3)
    assert (next(another).inputs != expected[0].inputs).any()


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_processes_read_parts_of_the_same_batches(kind: str) -> None:
    ids = np.random.default_rng(0).integers(0, 50, 2000).astype(np.int32)
    whole, _ = batches.make_batches(ids, fields(kind, 6, 7), seed=5)
    parts = [
        batches.make_batches(ids, fields(kind, 6, 7), seed=5, part=(k, 2))[0] for k in range(2)
    ]
    for _ in range(3):
        expected = next(whole)
        rows = np.concatenate([next(part).inputs for part in parts])
        np.testing.assert_array_equal(rows, expected.inputs)


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_the_shortest_text_that_makes_one_batch(kind: str) -> None:
    with pytest.raises(UserError, match="too short: .* need (\\d+) tokens, but it has 20") as error:
        batches.make_batches(np.zeros(20, np.int32), fields(kind, 4, 10), seed=0)
    needed = int(str(error.value).split(" need ")[1].split()[0])
    _, steps = batches.make_batches(np.zeros(needed, np.int32), fields(kind, 4, 10), seed=0)
    assert steps == 1
    with pytest.raises(UserError):
        batches.make_batches(np.zeros(needed - 1, np.int32), fields(kind, 4, 10), seed=0)
