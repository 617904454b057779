"""Train one layer on Tiny Shakespeare: earlier versions of quick.py, in the same time."""
# python -m lstm_jax.main --config experiments/quick_one_layer.py
#
# Three seeds: validation 1.344 ± 0.004, test 1.469 ± 0.008 nats per character (Zen 4).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return a config of one layer with 448 hidden units."""
    config: ConfigDict = config_lib.load("experiments/quick.py")

    config.model.num_layers = 1
    config.model.hidden_size = 448
    config.model.embedding_size = 128
    config.model.skip_connections = False
    config.model.initial_embedding = 1.0

    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.weight_decay = 0.1

    config.regularization.embedding_dropout = 0.03
    config.regularization.output_dropout = 0.1
    return config
