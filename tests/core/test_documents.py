"""Compare texts of documents with their documents, each read alone from the initial carry."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from lstm_jax import dynamic
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.model import LanguageModel
from lstm_jax.ops import native
from references import value_and_gradients

BATCH, TIME, STOP = 3, 21, 4
IDS = np.random.default_rng(0).choice([0, 1, 2, 3, 5, 6], (BATCH, TIME)).astype(np.int32)
# At the start and the end of a window, next to each other, at the end of the text, and nowhere.
IDS[0, [3, 9, 10, 20]] = IDS[1, [0, 8, 12]] = STOP
CUTS = (0, 9, 10, TIME)


def split(ids: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each document in ids [time]; all but the first begin with `STOP`."""
    return np.split(np.arange(len(ids)), np.flatnonzero(ids == STOP))


def read_alone(model: LanguageModel, params: Any, carry: Any) -> jax.Array:
    """Return the logits for `IDS`, of which each document is a row of a batch."""
    rows, carries = [], []
    first = model.initial_carry(1)
    for b in range(BATCH):
        for number, positions in enumerate(split(IDS[b])):
            rows.append((b, positions))
            of_text = jax.tree.map(lambda x, b=b: x[b : b + 1], carry)
            carries.append(first if number else of_text)
    ids = np.zeros((len(rows), TIME), np.int32)
    for row, (b, positions) in zip(ids, rows, strict=True):
        row[: len(positions)] = IDS[b, positions]
    state = jax.tree.map(lambda *parts: jnp.concatenate(parts), *carries)
    logits, _ = model_lib.apply(model, params, ids, state)
    texts: list[list[jax.Array]] = [[] for _ in range(BATCH)]
    for read, (b, positions) in zip(logits, rows, strict=True):
        texts[b].append(read[: len(positions)])
    return jnp.stack([jnp.concatenate(parts) for parts in texts])


def read_windows(model: LanguageModel, params: Any, carry: Any) -> jax.Array:
    """Return the logits for `IDS`, read in windows with the carry kept."""
    logits = []
    for begin, end in itertools.pairwise(CUTS):
        of_window, carry = model_lib.apply(model, params, IDS[:, begin:end], carry)
        logits.append(of_window)
    return jnp.concatenate(logits, axis=1)


MODELS = [
    ("lstm", "none", "scan"),
    ("lstm", "none", "auto"),
    ("minlstm", "none", "auto"),
    ("mlstm", "none", "auto"),
    ("gru", "residual", "auto"),
]


@pytest.mark.parametrize(("cell", "block", "recurrence"), MODELS)
def test_every_document_is_read_alone(
    cell: str, block: str, recurrence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lstm_jax.ops.scans._CHUNK", 8)
    monkeypatch.setattr(native, "load_library", lambda: None)
    layers = 2 if cell == "lstm" else 1
    alone = LanguageModel(7, 5, 8, layers, "scan", cell=cell, block=block)
    params = models.draw_params(alone)
    rng = np.random.default_rng(1)
    carry = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 0.9, x.shape), x.dtype), alone.initial_carry(BATCH)
    )
    weights = jnp.cos(jnp.arange(BATCH * TIME * 7.0)).reshape(BATCH, TIME, 7)
    read = functools.partial(read_alone, alone)
    expected, grads = value_and_gradients(read, weights, params, carry)
    whole = alone.clone(recurrence=recurrence, stop_id=STOP)
    read = functools.partial(read_windows, whole)
    actual, actual_grads = value_and_gradients(read, weights, params, carry)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    for a, e in zip(jax.tree.leaves(actual_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4 * max(1, np.abs(e).max()))
    arrays, after = whole.prepare_step(params), carry
    step = jax.jit(whole.apply_step)
    for t in range(TIME):
        one, after = step(arrays, IDS[:, t], after)
        np.testing.assert_allclose(one, expected[:, t], atol=2e-5)


def test_measures_of_a_text_are_those_of_its_documents() -> None:
    model = LanguageModel(7, 5, 8, stop_id=STOP)
    params = models.draw_params(model)
    ids = IDS.ravel()
    parts = []
    for positions in split(ids):
        with_target = ids[positions[0] : positions[-1] + 2]
        parts.append(loss_lib.compute_token_losses(model.clone(stop_id=None), params, with_target))
    expected = np.concatenate(parts)
    losses = loss_lib.compute_token_losses(model, params, ids)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    sizes = dynamic.measure_gradient_sizes(model, params, ids, 9)
    settings = dynamic.Settings(0.0, 0.0, 9)
    of_segments = dynamic.compute_dynamic_losses(model, params, ids, settings, sizes)
    np.testing.assert_allclose(of_segments, expected, atol=1e-5)
