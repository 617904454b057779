"""Search space for experiments/cells.py: the fields that matter most for training a cell."""
# python -m lstm_jax.sweep --config experiments/cells.py:gru --space experiments/sweeps/cells.py \
#     --trials 20

from typing import Any

import optuna


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return fields of the optimizer and the dropout; all else stays the same."""
    return {
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2, log=True),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-2, 1.0, log=True),
        "optimizer.max_gradient_norm": trial.suggest_float("clip", 0.1, 4.0, log=True),
        "regularization.output_dropout": trial.suggest_float("output_dropout", 0.0, 0.4),
    }
