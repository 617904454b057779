"""Train on the characters of Penn Treebank, a quarter of an hour on two CPU cores, or two hours."""
# python -m lstm_jax.main --config experiments/penn_treebank.py
# python -m lstm_jax.main --config experiments/penn_treebank.py:512
#
# Downloads the text. Validation and test loss in bits per character, and minutes on two cores of an
# AMD EPYC:
#
#   one layer of 448    1.400 ± 0.002, 1.364 ± 0.002 (three seeds), 12 minutes (Zen 4)
#   :512, two layers    1.314, 1.283 (one run), 100 minutes beside other programs (Zen 4)
#   :1024, two layers   1.295, 1.265 (one run), 136 minutes (Zen 5)

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config(hidden_size: str = "448") -> ConfigDict:
    """Return the model of quick_one_layer.py, or two larger layers, for a text of 5 MB."""
    config: ConfigDict = config_lib.load("experiments/quick_one_layer.py")

    config.data.dataset = "penn_treebank"

    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.02

    config.regularization.embedding_dropout = 0.0
    config.regularization.output_dropout = 0.0

    config.num_epochs = 8
    if hidden_size == "448":
        return config

    # Rate, epochs, and dropout between layers and of outputs.
    rate, epochs, dropout, recurrent_dropout = {
        "512": (8e-3, 18, 0.2, 0.1),
        "1024": (5e-3, 13, 0.3, 0.2),
    }[hidden_size]
    config.model.num_layers, config.model.hidden_size = 2, int(hidden_size)
    config.model.skip_connections = True
    config.optimizer.learning_rate = rate
    config.optimizer.weight_decay = 0.03
    config.regularization.hidden_dropout = config.regularization.output_dropout = dropout
    config.regularization.recurrent_dropout = recurrent_dropout
    config.num_epochs = epochs
    return config
