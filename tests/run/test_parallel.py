"""Compare several devices with one, in new processes: JAX creates its devices once."""

import json
from pathlib import Path
from unittest import mock

import jax
import pytest

import commands
from lstm_jax import config as config_lib
from lstm_jax.devices import hosts, parallel
from lstm_jax.errors import UserError
from lstm_jax.ops import processor

# A cell in a file of its own, whose carry has a matrix and an integer for each text.
OWN_CELL = f"{Path(__file__).parents[1]}/fixtures/delta_cell.py:DeltaCell"
_SCRIPT = """
import json, sys
import jax, numpy as np
from lstm_jax import batches, config, model, optimizer, train_step
from lstm_jax.devices import parallel
from lstm_jax.run import cell_file

jax.config.update("jax_num_cpu_devices", 8)
settings, cell = config.default(), sys.argv[1]
settings.batches.batch_size = 16
settings.model.embedding_size, settings.model.hidden_size, settings.model.num_layers = 6, 20, 2
settings.model.cell, settings.model.layer_norm = cell, cell == "gru"
cell_file.resolve_cell(config.complete_config(settings).model)  # Loads the cell.
settings.optimizer.learning_rate, settings.optimizer.average_decay = 0.01, 0.9
settings.optimizer.microbatches = 2
settings.optimizer.epsilon = 1e-3  # Adam otherwise amplifies the rounding of tiny gradients.
for name in settings.regularization:
    settings.regularization[name] = 0.2
lstm = model.make_model(settings.model, 30)
adam = optimizer.make_optimizer(settings.optimizer, 50)


def train(mesh):
    state = train_step.init_state(lstm, adam, jax.random.key(0), 16, True, mesh=mesh)
    step = train_step.make_train_step(lstm, adam, settings, mesh)
    rng, losses = np.random.default_rng(0), []
    for k in range(30):
        ids = rng.integers(0, 30, (16, 13)).astype(np.int32)
        state = step(state, batches.Batch(ids[:, :-1], ids[:, 1:], np.bool_(k % 10 == 0)))
        losses.append(float(state.loss_sum))
        state = state._replace(loss_sum=0 * state.loss_sum)
    for x in jax.tree.leaves((state.params, state.average, state.opt_state)):
        if x.ndim > 1:
            divided = any(size % settings.mesh.model == 0 for size in x.shape)
            parts = settings.mesh.model if divided else 1
            assert x.addressable_data(0).size * parts == x.size, x.shape
    return losses, parallel.gather_on_one_device((state.params, state.average), mesh)


expected = None
for settings.mesh.data, settings.mesh.model in json.loads(sys.argv[2]):
    mesh = parallel.make_mesh(settings)
    assert mesh.shape == dict(settings.mesh)
    found = jax.tree.map(np.asarray, train(mesh))
    expected = expected or found  # Of one device.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
"""


@pytest.mark.process
@pytest.mark.parametrize(("cell", "meshes"), [("lstm", [(8, 1), (4, 2)]), (OWN_CELL, [(1, 4)])])
def test_many_devices_train_like_one(cell: str, meshes: list[tuple[int, int]]) -> None:
    """Include dropout, penalties, microbatches, averaged weights and the carry."""
    result = commands.run_python("-c", _SCRIPT, cell, json.dumps([(1, 1), *meshes]))
    assert result.returncode == 0, result.stderr


def test_cores_are_limited_by_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {*range(64)}, raising=False)
    limits = mock.Mock()
    monkeypatch.setattr(processor, "Path", lambda name: limits)
    for limit, number in (("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64)):
        limits.read_text.return_value = limit
        assert processor.count_cores() == number


def test_an_invalid_mesh_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_lib.default()
    config.mesh.data = 1000
    with pytest.raises(UserError, match="there are 1 devices here"):
        parallel.make_mesh(config)
    config.mesh.data, config.mesh.model = 0, 2
    with pytest.raises(UserError, match="mesh.model 2, but there are 1 devices here"):
        parallel.make_mesh(config)
    config.mesh.data, config.mesh.model = 1, 1
    config.optimizer.microbatches = 7
    with pytest.raises(UserError, match=r"multiple of .* 7"):
        parallel.make_mesh(config)
    config.optimizer.microbatches = 1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="choose a multiple of the number of processes"):
        parallel.make_mesh(config)


def test_the_flags_of_processes_belong_together() -> None:
    with (
        pytest.raises(UserError, match="belong together: set all three"),
        hosts.join_processes("localhost:1", 2, None, timeout_seconds=1),
    ):
        pass
