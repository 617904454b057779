"""Train on WikiText-2, words of 720 Wikipedia articles, with AWD-LSTM's settings."""
# python -m lstm_jax.main --config experiments/wikitext2.py
#
# Downloads the text. Not run to the end: 33,546,080 parameters, an estimated 20 days on two cores
# of an AMD EPYC (Zen 4). Published with fine-tuning, which this config does not do: a perplexity of
# 65.8 on the test split (Merity et al. 2018).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the config of experiments/penn_treebank_words.py, with other dropout rates."""
    config: ConfigDict = config_lib.load("experiments/penn_treebank_words.py")

    config.data.dataset = "wikitext2"
    config.batches.batch_size = 80
    config.regularization.input_dropout = 0.65
    config.regularization.hidden_dropout = 0.2
    config.num_epochs = 750
    return config
