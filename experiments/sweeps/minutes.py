"""Search space for experiments/minutes.py: what it chooses itself, but the number of steps."""
# python -m lstm_jax.sweep --config experiments/minutes.py:1 --config.data.path=my.txt --trials 20 \
#     --space experiments/sweeps/minutes.py --pruner none

from typing import Any

import optuna


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return fields of a run, whose steps then follow from the minutes and its speed."""
    size = trial.suggest_categorical("hidden_size", [128, 192, 256, 384, 512])
    dropout = trial.suggest_float("dropout", 0.0, 0.6)
    return {
        "model.hidden_size": size,
        "model.embedding_size": min(size, 256),
        "batches.batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 3e-3, 3e-2, log=True),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 0.01, 0.5, log=True),
        "regularization.embedding_dropout": dropout / 6,
        "regularization.input_dropout": dropout / 2,
        "regularization.hidden_dropout": dropout * 2 / 3,
        "regularization.output_dropout": dropout,
        "regularization.recurrent_dropout": trial.suggest_float("recurrent_dropout", 0.0, 0.5),
    }
