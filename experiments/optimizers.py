"""Compare optimizers for the model of experiments/quick.py."""
# python -m lstm_jax.main --config experiments/optimizers.py:muon
#
# python benchmarks/compare.py --experiment experiments/optimizers.py tunes and trains all of them.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib

# Fields of each optimizer; those that are not given have their defaults.
VARIANTS: dict[str, dict[str, float]] = {
    "adam": {},
    "adam_b2_99": {"b2": 0.99},
    "lion": {"b2": 0.99},
    "muon": {"momentum": 0.95},
    "sgd": {"momentum": 0.9},
}


def get_config(name: str = "adam") -> ConfigDict:
    """Return the config of experiments/quick.py with this optimizer, to be tuned."""
    if name not in VARIANTS:
        raise ValueError(f"there is no optimizers.py:{name}: choose from {', '.join(VARIANTS)}")
    config = config_lib.default()

    config.batches.kind = "streams"
    config.batches.batch_size = 64
    config.batches.window_length = 48

    config.model.embedding_size = 128
    config.model.hidden_size = 448
    config.model.initial_embedding = 1.0
    config.model.dtype = "auto"

    config.optimizer.name = name.partition("_")[0]
    config.optimizer.update(VARIANTS[name])
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule = "linear"
    config.optimizer.max_gradient_norm = 0.25

    config.regularization.embedding_dropout = 0.03
    config.regularization.output_dropout = 0.1

    config.num_epochs = 6
    return config
