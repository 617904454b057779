"""Train a trained model further on another text: the config of --init_from without --config."""
# python -m lstm_jax.main --init_from MODEL --config.data.path=my.txt
#
# The same as --config experiments/finetune.py:MODEL. docs/training.md has measurements.

from ml_collections import ConfigDict

from lstm_jax import cells
from lstm_jax import config as config_lib
from lstm_jax.run import workdir


def get_config(model: str = "tiny-shakespeare") -> ConfigDict:
    """Return the config of experiments/quick.py, for the model and tokens of a trained model.

    A fifth of its learning rate keeps what the model knows, and strong dropout is for a short text.
    """
    trained = workdir.load_config(workdir.find_model(model))
    config: ConfigDict = config_lib.load("experiments/quick.py")
    config.init_from = model

    config.data.units = trained.data.units
    config.data.document_separator = trained.data.document_separator

    config.model.update(trained.to_dict()["model"])
    config.model.recurrence = "auto"  # The model may have been trained on another kind of device.
    if cells.names_file(trained.model.cell):
        # The file is code: it runs only if the user names it.
        config.model.cell, config.model.options = "lstm", {}

    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.1
    config.regularization.output_dropout = 0.3
    if trained.model.num_layers > 1:
        config.regularization.hidden_dropout = 0.3

    config.num_epochs = 12
    return config
