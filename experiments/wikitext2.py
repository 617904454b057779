"""Train on WikiText-2, words of 720 Wikipedia articles, with the settings of Penn Treebank."""
# python -m lstm_jax.main --config experiments/wikitext2.py
#
# Downloads the text. Not run to the end: 27,891,200 parameters, an estimated 8 hours on two cores
# of an AMD EPYC (Zen 4), where a step takes twice the time of that of penn_treebank_words.py.
# Published: a perplexity of 65.8 on the test split, by AWD-LSTM with 33 million parameters after
# 750 epochs (Merity et al. 2018).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the config of experiments/penn_treebank_words.py for another text."""
    config: ConfigDict = config_lib.load("experiments/penn_treebank_words.py")

    config.data.dataset = "wikitext2"
    return config
