"""Search space of a population, whose members differ in optimizer, dropout and initial weights."""
# python -m lstm_jax.sweep --config experiments/quick.py --space experiments/sweeps/population.py \
#     --trials 40 --population 8

from typing import Any

import optuna


def get_overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return fields that a compiled program reads as arrays, to train all members at once."""
    return {
        "model.initial_scale": trial.suggest_float("initial_scale", 0.5, 2.0, log=True),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-3, 1.6e-2, log=True),
        "optimizer.warmup_steps": trial.suggest_int("warmup_steps", 0, 300, step=50),
        "optimizer.schedule": trial.suggest_categorical("schedule", ["cosine", "linear"]),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "optimizer.max_gradient_norm": trial.suggest_float("clip", 0.1, 4.0, log=True),
        "regularization.embedding_dropout": trial.suggest_float("embedding_dropout", 0.0, 0.1),
        "regularization.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.2),
        "regularization.output_dropout": trial.suggest_float("output_dropout", 0.0, 0.5),
        "regularization.recurrent_dropout": trial.suggest_float("recurrent_dropout", 0.0, 0.3),
    }
