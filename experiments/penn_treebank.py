"""Train on the characters of Penn Treebank, a quarter of an hour on two CPU cores, or two hours."""
# python -m lstm_jax.main --config experiments/penn_treebank.py
# python -m lstm_jax.main --config experiments/penn_treebank.py:512
#
# Downloads the text. Validation and test loss in bits per character, and minutes on two cores:
#
#   two layers of 256   1.351 ± 0.002, 1.316 ± 0.001 (three seeds), 12 minutes (Xeon with AMX)
#   :512                1.290, 1.261 (one run), 73 minutes beside other programs (Xeon with AMX)
#   :1024               1.295, 1.265 (one run), 136 minutes (AMD Zen 5)

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config(hidden_size: str = "256") -> ConfigDict:
    """Return the model of quick.py, or larger ones, for a text of 5 MB."""
    config: ConfigDict = config_lib.load("experiments/quick.py")

    config.data.dataset = "penn_treebank"

    # Rate, epochs, activation regularization, and dropout.
    rate, epochs, activation, temporal_activation, dropout, recurrent_dropout = {
        "256": (1.2e-2, 16, 0.25, 0.25, 0.0, 0.0),
        "512": (1e-2, 24, 0.5, 0.25, 0.25, 0.15),
        "1024": (5e-3, 13, 0.0, 0.0, 0.3, 0.2),
    }[hidden_size]
    config.model.hidden_size = int(hidden_size)
    config.optimizer.learning_rate = rate
    config.optimizer.weight_decay = 0.03
    config.regularization.activation = activation
    config.regularization.temporal_activation = temporal_activation
    config.regularization.hidden_dropout = config.regularization.output_dropout = dropout
    config.regularization.recurrent_dropout = recurrent_dropout
    config.num_epochs = epochs
    if hidden_size == "1024":
        config.model.embedding_size = 128
        config.model.initial_embedding = 1.0
    return config
