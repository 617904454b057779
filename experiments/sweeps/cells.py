"""Search space for experiments/cells.py: what a cell's best training depends on."""
# python -m lstm_jax.sweep --config experiments/cells.py:gru --space experiments/sweeps/cells.py \
#     --trials 20

from typing import Any

import optuna


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return the optimizer and the dropout; model, batches and epochs stay the same."""
    return {
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 5e-4, 2e-2, log=True),
        "optimizer.warmup_steps": trial.suggest_int("warmup_steps", 0, 300, step=50),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "optimizer.max_gradient_norm": trial.suggest_float("clip", 0.1, 4.0, log=True),
        "regularization.embedding_dropout": trial.suggest_float("embedding_dropout", 0.0, 0.1),
        "regularization.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.2),
        "regularization.output_dropout": trial.suggest_float("output_dropout", 0.0, 0.5),
    }
