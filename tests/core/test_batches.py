"""Test how windows and streams cut a text into batches."""

import functools
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from lstm_jax import batches
from lstm_jax.errors import UserError


def fields(kind: str, batch_size: int, window_length: int) -> ConfigDict:
    shape = {"batch_size": batch_size, "window_length": window_length}
    return ConfigDict({"kind": kind, **shape, "reset_probability": 0.1})


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_an_epoch_reads_the_text_once_in_segments_drawn_anew(kind: str) -> None:
    length, size, window = 6050, 4, 10
    ids = np.arange(length, dtype=np.int32)  # Each id is its own position.
    steps = batches.count_steps(length, fields(kind, size, window))
    assert steps == 151
    iterator = batches.make_batches(ids, fields(kind, size, window), seed=1)
    boundaries, distances = set(), set()
    for _ in range(3):
        epoch = [next(iterator) for _ in range(steps)]
        for batch in epoch:
            assert batch.inputs.shape == batch.targets.shape == (size, window)
            assert batch.inputs.dtype == batch.targets.dtype == np.int32
            np.testing.assert_array_equal(batch.targets, (batch.inputs + 1) % length)
        assert len({*np.ravel([batch.inputs for batch in epoch])}) == steps * size * window
        reset = np.array([batch.reset for batch in epoch])
        assert reset[0].all()
        assert reset.all() if kind == "windows" else 0.05 < reset[1:].mean() < 0.15
        for before, after in itertools.pairwise(epoch):
            assert (after.reset | (after.inputs[:, 0] == before.targets[:, -1])).all()
        boundaries.add(int(epoch[0].inputs[0, 0]) % window)
        (batch,) = (batch for batch in epoch if 3000 in batch.inputs)
        distances.add(tuple(sorted(abs(batch.inputs[:, 0] - 3000) // 100)))
    assert len(boundaries) == len(distances) == 3


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_all_tokens_are_read_equally_often(kind: str) -> None:
    length, epochs = 70, 1000  # An epoch reads 60 tokens.
    ids = np.arange(length, dtype=np.int32)  # Each id is its own position.
    iterator = batches.make_batches(ids, fields(kind, 3, 10), seed=0)
    positions = np.array([batch.inputs for batch in itertools.islice(iterator, 2 * epochs)])
    counts = np.bincount(positions.ravel(), minlength=length)
    np.testing.assert_allclose(counts, epochs * 60 / 70, atol=60)  # Five standard deviations.


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_an_iterator_starts_at_any_step_and_reads_a_part_of_each_batch(kind: str) -> None:
    ids = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint8)
    predictions = np.eye(50, dtype=np.float16)[ids]  # Row i is for ids[i].
    make = functools.partial(batches.make_batches, ids, fields(kind, 6, 7), predictions=predictions)
    steps = batches.count_steps(len(ids), fields(kind, 6, 7))
    first = steps - 2
    parts = [make(seed=5, part=(k, 2), first_step=first) for k in range(2)]
    for expected in itertools.islice(make(seed=5), first, steps + 3):
        np.testing.assert_array_equal(expected.soft_targets.argmax(-1), expected.targets)
        for array, *rows in zip(expected, *map(next, parts), strict=True):
            np.testing.assert_array_equal(np.concatenate(rows), array)
    others = make(seed=6, first_step=steps + 2)
    assert (next(others).inputs != expected.inputs).any()


@pytest.mark.parametrize("kind", ["windows", "streams"])
def test_the_shortest_text_that_makes_one_batch(kind: str) -> None:
    with pytest.raises(UserError, match="too short: .* need (\\d+) tokens, but it has 20") as error:
        batches.count_steps(20, fields(kind, 4, 10))
    needed = int(str(error.value).split(" need ")[1].split()[0])
    assert batches.count_steps(needed, fields(kind, 4, 10)) == 1
    with pytest.raises(UserError):
        batches.count_steps(needed - 1, fields(kind, 4, 10))
