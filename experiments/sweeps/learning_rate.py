"""Search space for any experiment: five learning rates, for --sampler grid."""
# python -m lstm_jax.sweep --config experiments/cells.py:gru --sampler grid --trials 5 \
#     --space experiments/sweeps/learning_rate.py

from typing import Any

import optuna


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return a learning rate."""
    rates = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    return {"optimizer.learning_rate": trial.suggest_categorical("learning_rate", rates)}
