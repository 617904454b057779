"""Several devices against one. Devices are made before JAX starts, hence in processes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lstm_jax import config as config_lib
from lstm_jax import parallel
from lstm_jax.errors import UserError

_SCRIPT = """
import json, sys
import jax, numpy as np
from lstm_jax import batches, config, model, optimizer, parallel, train_step

settings = config.default()
settings.mesh.data = int(sys.argv[1])
settings.batches.batch_size = 16
settings.model.embedding_size, settings.model.hidden_size, settings.model.num_layers = 6, 20, 2
settings.optimizer.learning_rate = 0.01
settings.optimizer.microbatches = 2
for name in settings.regularization:
    settings.regularization[name] = 0.2
parallel.use_cores(settings)
mesh = parallel.make_mesh(settings)
assert mesh.size == settings.mesh.data
lstm = model.from_config(settings.model, 30)
adam = optimizer.make(settings.optimizer, 50)
state = train_step.init_state(lstm, adam, jax.random.key(0), 16).place(mesh)
step = train_step.make_train_step(lstm, adam, settings, mesh)
rng, losses = np.random.default_rng(0), []
for k in range(50):
    ids = rng.integers(0, 30, (16, 13)).astype(np.int32)
    state = step(state, batches.Batch(ids[:, :-1], ids[:, 1:], np.bool_(k % 10 == 0)))
    losses.append(float(state.loss_sum))
params = parallel.on_one_device(state.params)
print(json.dumps([losses, [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(params)]]))
"""


def run(devices: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Summed losses of 50 steps, and the parameters after them."""
    command = [sys.executable, "-c", _SCRIPT, str(devices)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    losses, params = json.loads(result.stdout)
    return np.array(losses), [np.array(x) for x in params]


def test_many_devices_train_as_one_does() -> None:
    """Dropout, penalties, microbatches and the carry included."""
    losses, params = run(1)
    for devices in (2, 8):
        more_losses, more_params = run(devices)
        np.testing.assert_allclose(np.diff(more_losses), np.diff(losses), atol=1e-5)
        for a, b in zip(more_params, params, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_mesh_that_cannot_be_is_refused() -> None:
    config = config_lib.default()
    config.mesh.data = 1000
    with pytest.raises(UserError, match="there are 1 devices here"):
        parallel.make_mesh(config)
    config.mesh.data = 1
    config.optimizer.microbatches = 7
    with pytest.raises(UserError, match=r"multiple of .* 7"):
        parallel.make_mesh(config)
