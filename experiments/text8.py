"""Train on text8, 100 MB of cleaned Wikipedia, with AWD-LSTM's settings for enwik8."""
# python -m lstm_jax.main --config experiments/text8.py
#
# Downloads the text. Not run to the end. Merity et al. publish no result for text8; of LSTMs of
# this size, the multiplicative LSTM of Krause et al. 2016 has 1.27 bits per character on the test
# split, with 45 million parameters. This model has 47,183,149.
#
# Estimated time: as that of experiments/enwik8.py.

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config of experiments/enwik8.py, for characters of text8."""
    experiment = runpy.run_path(str(Path(__file__).with_name("enwik8.py")))
    config: ConfigDict = experiment["get_config"]()

    config.data.dataset = "text8"
    config.data.units = "characters"
    return config
