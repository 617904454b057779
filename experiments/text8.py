"""Train on text8, 100 MB of cleaned Wikipedia, with AWD-LSTM's settings for enwik8."""
# python -m lstm_jax.main --config experiments/text8.py
#
# Downloads the text. Not run to the end: 47,183,149 parameters, and the time of enwik8.py.
# Published: 1.27 bits per character on the test split, by a multiplicative LSTM of 45 million
# parameters (Krause et al. 2016).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the config of experiments/enwik8.py, for characters of text8."""
    config: ConfigDict = config_lib.load("experiments/enwik8.py")

    config.data.dataset = "text8"
    config.data.units = "characters"
    return config
