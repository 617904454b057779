"""Compare several devices with one, in new processes: JAX creates its devices once."""

from pathlib import Path
from unittest import mock

import jax
import pytest

import commands
from lstm_jax import config as config_lib
from lstm_jax.devices.mesh import make_mesh
from lstm_jax.errors import UserError
from lstm_jax.ops import processor

# A cell in a file of its own, whose carry has a matrix and an integer for each text.
OWN_CELL = f"{Path(__file__).parents[1]}/fixtures/delta_cell.py:DeltaCell"
_SCRIPT = """
import sys
import jax, numpy as np
from lstm_jax import batches, config, model, optimizer, train_step
from lstm_jax.devices.mesh import get_local_copy, make_mesh
from lstm_jax import cells

jax.config.update("jax_num_cpu_devices", 8)
settings, cell = config.default(), sys.argv[1]
settings.batches.batch_size = 16
settings.model.embedding_size, settings.model.hidden_size, settings.model.num_layers = 6, 20, 2
settings.model.cell = cell
cells.load_cell(cell)
settings.optimizer.learning_rate = 0.01
settings.optimizer.microbatches = 2
settings.optimizer.epsilon = 1e-3  # Adam otherwise amplifies the rounding of tiny gradients.
for name in settings.regularization:
    settings.regularization[name] = 0.2
lstm = model.make_model(settings.model, 30)
adam = optimizer.make_optimizer(settings.optimizer, 50)


def train(mesh):
    state = train_step.init_state(lstm, adam, settings).place(mesh)
    step = train_step.make_train_step(lstm, adam, settings, mesh)
    rng, losses = np.random.default_rng(0), []
    for k in range(30):
        ids = rng.integers(0, 30, (16, 13)).astype(np.int32)
        state = step(state, batches.Batch(ids[:, :-1], ids[:, 1:], np.full(16, k % 10 == 0)))
        losses.append(float(state.loss_sum))
        state = state._replace(loss_sum=0 * state.loss_sum)
    return losses, get_local_copy(state.params)


expected = None
for settings.mesh.data in 1, 4, 8:
    mesh = make_mesh(settings)
    assert mesh.size == settings.mesh.data
    found = jax.tree.map(np.asarray, train(mesh))
    expected = expected or found  # Of one device.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
"""


@pytest.mark.process
@pytest.mark.parametrize("cell", ["lstm", OWN_CELL])
def test_many_devices_train_like_one(cell: str) -> None:
    """Include dropout, microbatches and the carry."""
    result = commands.run_python("-c", _SCRIPT, cell)
    assert result.returncode == 0, result.stderr


def test_cores_are_limited_by_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {*range(64)}, raising=False)
    limits = mock.Mock()
    monkeypatch.setattr(processor, "Path", lambda name: limits)
    for limit, number in (("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64)):
        limits.read_text.return_value = limit
        assert processor.count_cores() == number


@pytest.mark.parametrize(("data", "processes"), [(1000, 1), (3, 1), (1, 2), (0, 3)])
def test_an_invalid_mesh_raises_an_error(
    data: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_lib.default()
    config.mesh.data = data
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * 6)
    with pytest.raises(UserError, match="multiple of the number of processes, .* devices, 6; and"):
        make_mesh(config)
