"""Train a larger model on Tiny Shakespeare, on a GPU."""
# python -m lstm_jax.main --config experiments/shakespeare_gpu.py
#
# Not yet run to the end.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return a config of two layers with 1,024 hidden units, and strong dropout."""
    config = config_lib.default()

    config.batches.kind = "streams"
    config.batches.batch_size = 32
    config.batches.window_length = 128

    config.model.embedding_size = 128
    config.model.hidden_size = 1024
    config.model.num_layers = 2
    config.model.dtype = "auto"

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 0.02
    config.optimizer.max_gradient_norm = 0.25

    config.regularization.embedding_dropout = 0.1
    config.regularization.hidden_dropout = 0.5
    config.regularization.output_dropout = 0.5
    config.regularization.recurrent_dropout = 0.3

    config.num_epochs = 40
    return config
