"""Train on the bytes of enwik8, 100 MB of Wikipedia, with AWD-LSTM's settings."""
# python -m lstm_jax.main --config experiments/enwik8.py
#
# Downloads the text. Not run to the end: 47,274,978 parameters, an estimated 62 days on two cores
# of an AMD EPYC (Zen 4). Published: 1.232 bits per byte on the test split (Merity et al. 2018).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return a config of three layers with 1,840 hidden units.

    The settings are those of Merity et al. 2018, "An Analysis of Neural Language Modeling at
    Multiple Scales", but the learning rate decays linearly and weight decay is decoupled from the
    gradient here, a stream starts from a zero state with probability 0.02 at each step, all windows
    have the same length, and initial parameters are this package's: Glorot uniform and orthogonal
    kernels, a bias of 1 for the forget gate, and the tokens' frequencies as the output bias.
    """
    config = config_lib.default()

    config.data.dataset = "enwik8"
    config.data.units = "bytes"

    config.batches.kind = "streams"
    config.batches.batch_size = 128
    config.batches.window_length = 200

    config.model.embedding_size = 400
    config.model.hidden_size = 1840
    config.model.num_layers = 3
    config.model.tie_embeddings = True
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 1.2e-6
    config.optimizer.max_gradient_norm = 0.25

    config.regularization.input_dropout = 0.1
    config.regularization.hidden_dropout = 0.1
    config.regularization.output_dropout = 0.4
    config.regularization.recurrent_dropout = 0.2

    config.num_epochs = 50
    return config
