"""Train the best model of a text that this machine can train in a number of minutes."""
# python -m lstm_jax.main --config experiments/minutes.py:10 --config.data.path=my.txt

from ml_collections import ConfigDict

from lstm_jax import budget
from lstm_jax import config as config_lib


def get_config(minutes: str = "10") -> ConfigDict:
    """Return a config whose open fields are chosen for the text and the machine (`budget.py`)."""
    config = config_lib.default()
    config.minutes = float(minutes)
    if config.minutes <= 0:
        raise ValueError(f"{minutes} minutes: there must be more than 0")

    config.batches.kind = "streams"
    config.batches.window_length = 48

    config.model.num_layers = 2
    config.model.skip_connections = True
    config.model.initial_embedding = 0.5
    config.model.dtype = "auto"

    config.optimizer.schedule = "linear"
    config.optimizer.max_gradient_norm = 0.25

    config.regularization.activation = 0.5
    config.regularization.temporal_activation = 0.25

    config.update_from_flattened_dict(dict.fromkeys(budget.OPENABLE))  # None: open.
    return config
