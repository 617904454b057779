"""Compare optimizers for the model of experiments/quick_one_layer.py."""
# python -m lstm_jax.main --config experiments/optimizers.py:muon
#
# python benchmarks/compare.py --experiment experiments/optimizers.py \
#     --space experiments/sweeps/optimizers.py tunes and trains all of them (docs/results.md).

from typing import Any

from ml_collections import ConfigDict

from lstm_jax import config as config_lib

# Fields of each optimizer; all others are those of quick_one_layer.py.
VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam"},
    "adam_b2_99": {"name": "adam", "b2": 0.99},
    "muon": {"name": "muon", "momentum": 0.95},
    "sgd": {"name": "sgd", "momentum": 0.9},
}


def get_config(name: str = "adam") -> ConfigDict:
    """Return the config of quick_one_layer.py with this optimizer, to be tuned."""
    if name not in VARIANTS:
        raise ValueError(f"there is no optimizers.py:{name}: choose from {', '.join(VARIANTS)}")
    config: ConfigDict = config_lib.load("experiments/quick_one_layer.py")
    config.optimizer.update(VARIANTS[name])
    return config
