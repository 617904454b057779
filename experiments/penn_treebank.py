"""Train on the characters of Penn Treebank, in a quarter of an hour on two CPU cores."""
# python -m lstm_jax.main --config experiments/penn_treebank.py
#
# Downloads the text. Validation 1.400 ± 0.002, test 1.364 ± 0.002 bits per character.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the model of quick_one_layer.py, with other settings for a text of 5 MB."""
    config: ConfigDict = config_lib.load("experiments/quick_one_layer.py")

    config.data.dataset = "penn_treebank"

    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.02

    config.regularization.embedding_dropout = 0.0
    config.regularization.output_dropout = 0.0

    config.num_epochs = 8
    return config
