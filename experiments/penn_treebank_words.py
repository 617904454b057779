"""Train on the words of Penn Treebank, with AWD-LSTM's settings."""
# python -m lstm_jax.main --config experiments/penn_treebank_words.py
#
# Downloads the text. Not run to the end: 24,211,602 parameters, an estimated 4 days on two cores of
# an AMD EPYC (Zen 4). docs/results.md has published results.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return a config of three layers with 1,150 hidden units.

    The settings are those of Merity et al. 2018, "Regularizing and Optimizing LSTM Language
    Models", but all windows have the same length, and a moving average of the parameters takes the
    place of averaged SGD; a stream starts from a zero state with probability 0.02 at each step; and
    initial parameters are this package's: Glorot uniform and orthogonal kernels, a bias of 1 for
    the forget gate, and the tokens' frequencies as the output bias.
    """
    config = config_lib.default()

    config.data.dataset = "penn_treebank"
    config.data.units = "tokens"

    config.batches.kind = "streams"
    config.batches.batch_size = 20
    config.batches.window_length = 70

    config.model.embedding_size = 400
    config.model.hidden_size = 1150
    config.model.num_layers = 3
    config.model.tie_embeddings = True
    config.model.initial_embedding = 0.1
    config.model.dtype = "bfloat16"

    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.0
    config.optimizer.learning_rate = 30.0
    config.optimizer.weight_decay = 1.2e-6
    config.optimizer.max_gradient_norm = 0.25
    config.optimizer.average_decay = 0.9998

    config.regularization.embedding_dropout = 0.1
    config.regularization.input_dropout = 0.4
    config.regularization.hidden_dropout = 0.25
    config.regularization.output_dropout = 0.4
    config.regularization.recurrent_dropout = 0.5
    config.regularization.activation_penalty = 2.0
    config.regularization.temporal_activation_penalty = 1.0

    config.num_epochs = 500
    config.sample.length = 100
    return config
