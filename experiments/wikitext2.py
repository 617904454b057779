"""Train on WikiText-2, words of 720 Wikipedia articles, with AWD-LSTM's settings."""
# python -m lstm_jax.main --config experiments/wikitext2.py
#
# Downloads the text. Aims at the published perplexity of 65.8 per word on the test split and 68.6
# on the validation split, with fine-tuning, which this config does not do, and 33 million
# parameters (Merity et al. 2018). This model has 20,200,800 in its layers and 401 for each token of
# the vocabulary, together 33,545,278 for the published 33,278 words. Not yet run to the end.
#
# Perplexities are published per word between spaces, with the end of each line as a word. Here
# some of these words are several tokens, such as <unk>. With b bits per character, the perplexity
# per published word is 2 ** (5.130 b) on the validation split and 2 ** (5.093 b) on the test split.
#
# Estimated time: 5 hours on an H100, 24 days on two CPU cores. This is not a measurement, but 6
# operations per parameter and token, for 750 epochs of 2.80 million tokens (1.34 per word, as in
# the validation split), divided by an assumed 25 TFLOP/s for the H100 and 200 GFLOP/s for the
# cores, in bfloat16.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return a config of three layers with 1,150 hidden units.

    The settings are those of Merity et al. 2018, "Regularizing and Optimizing LSTM Language
    Models", but all windows have the same length, and a moving average of the parameters takes the
    place of averaged SGD.
    """
    config = config_lib.default()

    config.data.dataset = "wikitext2"
    config.data.units = "words"

    config.batches.kind = "streams"
    config.batches.batch_size = 80
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
    config.regularization.input_dropout = 0.65
    config.regularization.hidden_dropout = 0.2
    config.regularization.output_dropout = 0.4
    config.regularization.recurrent_dropout = 0.5
    config.regularization.activation_penalty = 2.0
    config.regularization.temporal_activation_penalty = 1.0

    config.num_epochs = 750
    config.sample.length = 100
    return config
