"""Search space for quick.py at the same training time: model and text stay the same."""
# python -m lstm_jax.sweep --config experiments/quick.py --space experiments/sweeps/quick.py \
#     --trials 40

from typing import Any

import optuna


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return the optimizer, the dropout, and the shape of a batch of 3,072 characters.

    Model and epochs stay the same, so that a trial takes the same time as quick.py.
    """
    batch_size = trial.suggest_categorical("batch_size", [32, 64, 128])
    return {
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 2e-3, 3e-2, log=True),
        "optimizer.warmup_steps": trial.suggest_int("warmup_steps", 0, 300, step=50),
        "optimizer.schedule": trial.suggest_categorical("schedule", ["cosine", "linear"]),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "optimizer.max_gradient_norm": trial.suggest_float("clip", 0.1, 4.0, log=True),
        "optimizer.b2": trial.suggest_categorical("b2", [0.98, 0.99, 0.999]),
        "model.initial_embedding": trial.suggest_float("initial_embedding", 0.05, 2.0, log=True),
        "regularization.embedding_dropout": trial.suggest_float("embedding_dropout", 0.0, 0.1),
        "regularization.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.2),
        "regularization.output_dropout": trial.suggest_float("output_dropout", 0.0, 0.5),
        "regularization.recurrent_dropout": trial.suggest_float("recurrent_dropout", 0.0, 0.3),
        "batches.batch_size": batch_size,
        "batches.window_length": 3072 // batch_size,
    }
