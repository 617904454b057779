"""Train on the characters of Penn Treebank, a quarter of an hour on two CPU cores, or two hours."""
# python -m lstm_jax.main --config experiments/penn_treebank.py
# python -m lstm_jax.main --config experiments/penn_treebank.py:512
#
# Downloads the text. Validation and test loss in bits per character, and minutes on two cores:
#
#   two layers of 256   1.351 ± 0.002, 1.316 ± 0.001 (three seeds), 12 minutes (Xeon with AMX)
#   :512                1.314, 1.283 (one run), 100 minutes beside other programs (AMD Zen 4)
#   :1024               1.295, 1.265 (one run), 136 minutes (AMD Zen 5)

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config(hidden_size: str = "256") -> ConfigDict:
    """Return the model of quick.py, or larger ones, for a text of 5 MB."""
    config: ConfigDict = config_lib.load("experiments/quick.py")

    config.data.dataset = "penn_treebank"

    config.optimizer.weight_decay = 0.03
    if hidden_size == "256":
        config.optimizer.learning_rate = 1.2e-2
        config.regularization.activation = config.regularization.temporal_activation = 0.25
        config.num_epochs = 16
        return config

    # Rate, epochs, and dropout between layers and of outputs.
    rate, epochs, dropout, recurrent_dropout = {
        "512": (8e-3, 18, 0.2, 0.1),
        "1024": (5e-3, 13, 0.3, 0.2),
    }[hidden_size]
    config.model.hidden_size = int(hidden_size)
    config.model.embedding_size = 128
    config.model.initial_embedding = 1.0
    config.optimizer.learning_rate = rate
    config.regularization.hidden_dropout = config.regularization.output_dropout = dropout
    config.regularization.recurrent_dropout = recurrent_dropout
    config.num_epochs = epochs
    return config
