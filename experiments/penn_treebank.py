"""Train on the characters of Penn Treebank, with AWD-LSTM's settings."""
# python -m lstm_jax.main --config experiments/penn_treebank.py
#
# Downloads the text. Aims at the published 1.175 bits per character on the test split, with 13.8
# million parameters (Merity et al. 2018); this model has 13,779,252. Not yet run to the end.
#
# Estimated time: 2.3 hours on an H100, 12 days on two CPU cores (computed: docs/data.md).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return a config of three layers with 1,000 hidden units.

    The settings are those of Merity et al. 2018, "An Analysis of Neural Language Modeling at
    Multiple Scales", but weight decay is decoupled from the gradient here.
    """
    config = config_lib.default()

    config.data.dataset = "penn_treebank"

    config.batches.kind = "streams"
    config.batches.batch_size = 128
    config.batches.window_length = 150

    config.model.embedding_size = 200
    config.model.hidden_size = 1000
    config.model.num_layers = 3
    config.model.tie_embeddings = True
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "step"
    config.optimizer.step_at = (0.6, 0.8)
    config.optimizer.weight_decay = 1.2e-6
    config.optimizer.max_gradient_norm = 0.25

    config.regularization.input_dropout = 0.1
    config.regularization.hidden_dropout = 0.25
    config.regularization.output_dropout = 0.1
    config.regularization.recurrent_dropout = 0.5

    config.num_epochs = 500
    return config
