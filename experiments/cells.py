"""Compare cells at equal numbers of parameters and steps: one layer, or three in blocks."""
# python -m lstm_jax.main --config experiments/cells.py:gru
#
# python benchmarks/compare.py tunes and trains all of them (docs/results.md).

from ml_collections import ConfigDict

from lstm_jax import config as config_lib

# Fields of models of 0.72 million parameters: cell, layers, hidden units, block.
VARIANTS = {
    "lstm": ("lstm", 1, 384, "none"),
    "gru": ("gru", 1, 448, "none"),
    "rnn": ("rnn", 1, 784, "none"),
    "peephole": ("peephole", 1, 384, "none"),
    "mogrifier": ("mogrifier", 1, 350, "none"),
    "multiplicative": ("multiplicative", 1, 341, "none"),
    "lstm_block": ("lstm", 3, 129, "residual"),
    "minlstm": ("minlstm", 3, 160, "residual"),
    "mingru": ("mingru", 3, 169, "residual"),
    "rglru": ("rglru", 3, 160, "residual"),
    "slstm": ("slstm", 3, 144, "residual"),
    "mlstm": ("mlstm", 3, 152, "residual"),
}


def get_config(name: str = "lstm") -> ConfigDict:
    """Return a config of the given model, trained much as quick_one_layer.py trains its LSTM."""
    if name not in VARIANTS:
        raise ValueError(f"there is no cells.py:{name}: choose from {', '.join(VARIANTS)}")
    config: ConfigDict = config_lib.load("experiments/quick_one_layer.py")

    config.batches.window_length = 64

    cell, layers, hidden_size, block = VARIANTS[name]
    config.model.cell, config.model.block = cell, block
    config.model.embedding_size = 64
    config.model.num_layers, config.model.hidden_size = layers, hidden_size

    config.optimizer.learning_rate = 6e-3
    return config
