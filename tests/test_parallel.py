"""Compare several devices with one. Each mesh needs a new process: JAX creates its devices once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lstm_jax import config as config_lib
from lstm_jax.devices import parallel
from lstm_jax.errors import UserError

# A cell in a file of its own, whose carry has a matrix and an integer for each text.
OWN_CELL = f"{Path(__file__).parent}/fixtures/delta_cell.py:DeltaCell"
_SCRIPT = """
import json, sys
import jax, numpy as np
from lstm_jax import batches, config, model, optimizer, train_step
from lstm_jax.devices import parallel
from lstm_jax.run import cell_file

settings = config.default()
settings.mesh.data, settings.mesh.model, cell = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
settings.batches.batch_size = 16
settings.model.embedding_size, settings.model.hidden_size, settings.model.num_layers = 6, 20, 2
settings.model.cell, settings.model.layer_norm = cell, cell == "gru"
cell_file.settle_cell(config.complete_config(settings).model)  # Loads the cell.
settings.optimizer.learning_rate, settings.optimizer.average_decay = 0.01, 0.9
settings.optimizer.microbatches = 2
settings.optimizer.epsilon = 1e-3  # Adam otherwise amplifies the rounding of tiny gradients.
for name in settings.regularization:
    settings.regularization[name] = 0.2
parallel.use_cores(settings)
mesh = parallel.make_mesh(settings)
assert mesh.shape == dict(settings.mesh)
lstm = model.make_model(settings.model, 30)
adam = optimizer.make_optimizer(settings.optimizer, 50)
state = train_step.init_state(lstm, adam, jax.random.key(0), 16, True, mesh=mesh)
step = train_step.make_train_step(lstm, adam, settings, mesh)
rng, losses = np.random.default_rng(0), []
for k in range(50):
    ids = rng.integers(0, 30, (16, 13)).astype(np.int32)
    state = step(state, batches.Batch(ids[:, :-1], ids[:, 1:], np.bool_(k % 10 == 0)))
    losses.append(float(state.loss_sum))
    state = state._replace(loss_sum=0 * state.loss_sum)
kept = (state.params, state.average, state.opt_state)
matrices = [x for x in jax.tree.leaves(kept) if x.ndim > 1]
for x in matrices:
    divided = any(size % settings.mesh.model == 0 for size in x.shape)
    parts = settings.mesh.model if divided else 1
    assert x.addressable_data(0).size * parts == x.size, x.shape
params = parallel.gather_on_one_device((state.params, state.average), mesh)
print(json.dumps([losses, [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(params)]]))
"""


def run(data: int, model: int, cell: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the losses of 50 steps, then parameters and their averages."""
    command = [sys.executable, "-c", _SCRIPT, str(data), str(model), cell]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    losses, params = json.loads(result.stdout)
    return np.array(losses), [np.array(x) for x in params]


@pytest.mark.process
@pytest.mark.parametrize(
    ("cell", "meshes"),
    [("lstm", [(8, 1), (2, 2), (4, 2)]), ("gru", [(1, 4)]), (OWN_CELL, [(2, 1), (1, 2)])],
)
def test_many_devices_train_like_one(cell: str, meshes: list[tuple[int, int]]) -> None:
    """Include dropout, penalties, microbatches, averaged weights and the carry."""
    losses, params = run(1, 1, cell)
    for data, model in meshes:
        more_losses, more_params = run(data, model, cell)
        np.testing.assert_allclose(more_losses, losses, atol=1e-5)
        for a, b in zip(more_params, params, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_invalid_mesh_raises_an_error() -> None:
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
