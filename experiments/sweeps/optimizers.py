"""Search space for optimizers: ten learning rates from 4e-4 to 1.5, for --sampler grid."""
# python -m lstm_jax.sweep --config experiments/optimizers.py:muon --sampler grid --trials 10 \
#     --space experiments/sweeps/optimizers.py

from typing import Any

import optuna

# The share by which a step at the peak learning rate shrinks the weights, as in quick_one_layer.py;
# ten times that in SGD, where the momentum repeats it.
DECAY = 1.2e-3


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return a learning rate, and the weight decay with which weights shrink by the same share."""
    rates = [4e-4, 1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2, 0.1, 0.25, 0.6, 1.5]
    rate = trial.suggest_categorical("learning_rate", rates)
    return {"optimizer.learning_rate": rate, "optimizer.weight_decay": DECAY / rate}
