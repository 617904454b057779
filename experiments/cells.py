"""Compare LSTM, GRU and simple RNN at equal numbers of parameters and steps."""
# python -m lstm_jax.main --config experiments/cells.py:lstm
# python -m lstm_jax.main --config experiments/cells.py:gru
# python -m lstm_jax.main --config experiments/cells.py:rnn
#
# Validation and test loss of seed 0: LSTM 1.571 and 1.652, GRU 1.495 and 1.594, RNN 1.543 and
# 1.650. With --config.optimizer.learning_rate=4e-3, which is too high for the RNN: LSTM 1.443 and
# 1.553, GRU 1.426 and 1.557, RNN 1.582 and 1.689.
# Measured with --config.model.initial_bias=zeros --config.batches.reset_probability=0.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib

# Hidden units for a model of 0.72 million parameters.
_HIDDEN_SIZES = {"lstm": 384, "gru": 446, "rnn": 782}


def get_config(cell: str = "lstm") -> ConfigDict:
    """Return the config of quick.py with the given cell and half the learning rate."""
    if cell not in _HIDDEN_SIZES:
        raise ValueError(f"there is no cells.py:{cell}: choose from {', '.join(_HIDDEN_SIZES)}")
    config = config_lib.default()

    config.batches.kind = "streams"
    config.batches.batch_size = 32
    config.batches.window_length = 96

    config.model.cell = cell
    config.model.embedding_size = 64
    config.model.hidden_size = _HIDDEN_SIZES[cell]

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule = "cosine"
    config.optimizer.max_gradient_norm = 1.0

    config.num_epochs = 6
    return config
