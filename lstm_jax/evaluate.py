"""Measure a trained model on a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lstm_jax import command, dynamic
from lstm_jax.data import sources, texts
from lstm_jax.errors import UserError
from lstm_jax.loss import (
    PLACES,
    compute_bits_per_character,
    compute_losses,
    compute_perplexity,
    find_suspicion,
    fit_temperature,
    measure_zero_state,
)
from lstm_jax.run import workdir


def main() -> None:
    """Prints the loss of a trained model on a split, as one JSON object."""
    values = flags.FLAGS
    if values.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    names = values.split.split("+")
    if unknown := [name for name in names if name not in sources.SPLITS]:
        raise UserError(
            f"there is no split {unknown[0]!r}: --split is {', '.join(sources.SPLITS)}, or some of "
            "them with + between, read one after the other"
        )
    settings = dynamic.Settings(
        values.dynamic_learning_rate,
        values.dynamic_decay,
        values.dynamic_segment_length,
    )
    if settings.segment_length < 1 or min(settings) < 0:
        raise UserError(
            "--dynamic_segment_length must be 1 or more, --dynamic_learning_rate and "
            "--dynamic_decay 0 or more"
        )
    if values.dynamic and values.fit_temperature:
        raise UserError("--fit_temperature is for the model as it was trained: leave out --dynamic")
    trained = workdir.load_trained(Path(values.workdir))
    splits = texts.load_texts_of_run(
        trained.config.data, values.data_path, values.dataset, values.data_directory
    )
    parts = [splits[name] for name in names]
    ids = texts.Joined([part.encode(trained.vocabulary) for part in parts])
    result: dict[str, Any] = {"split": values.split}
    temperature = 1.0
    if values.fit_temperature:
        validation = splits["validation"].encode(trained.vocabulary)
        temperature = fit_temperature(trained.model, trained.params, validation)
        result["temperature"] = temperature
    if values.dynamic:
        read, model = splits["train"].encode(trained.vocabulary), trained.model
        sizes = dynamic.measure_gradient_sizes(model, trained.params, read, settings.segment_length)
        loss = dynamic.compute_dynamic_loss(model, trained.params, ids, settings, sizes)
        result["dynamic"] = settings._asdict()
    else:
        (loss,) = compute_losses(
            trained.model, trained.params, ids, np.array([temperature])
        ).tolist()
    if math.isnan(loss):
        raise UserError(
            f"the loss is not a number: the model of step {trained.step} in {values.workdir} has "
            "diverged, train it anew with a lower optimizer.learning_rate"
        )
    result |= {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": compute_bits_per_character(
            loss, trained.vocabulary, len(ids) - 1, *parts
        ),
        "perplexity": compute_perplexity(loss),
        "tokens": len(ids) - 1,
        "step": trained.step,
    }
    zero = None
    if values.zero_state:
        zero = measure_zero_state(trained.model, trained.params, ids, PLACES)
        result["zero_state"] = zero._asdict()
    if warning := find_suspicion({values.split: loss}, len(trained.vocabulary), zero):
        print(f"warning: {warning}", file=sys.stderr)
    # JSON has no word for infinity.
    print(json.dumps({name: None if v == math.inf else v for name, v in result.items()}))


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working directory of a training run.")
    flags.DEFINE_string(
        "split",
        "test",
        "Which part of the text to read: train, validation or test; validation+test reads both, "
        "the one after the other.",
    )
    command.define_text_flags()
    flags.DEFINE_bool(
        "fit_temperature",
        False,
        "Divide the logits by the temperature at which the loss on the validation split is least.",
    )
    flags.DEFINE_bool(
        "dynamic",
        False,
        "Dynamic evaluation: the model goes on learning from the text, after predicting it.",
    )
    flags.DEFINE_bool(
        "zero_state",
        False,
        f"Also measure {PLACES} places of the split, each read from a zero state.",
    )
    default = dynamic.Settings()
    flags.DEFINE_float(
        "dynamic_learning_rate", default.learning_rate, "Of its steps against the gradient."
    )
    flags.DEFINE_float(
        "dynamic_decay", default.decay, "Share of the way back to the trained weights a step."
    )
    flags.DEFINE_integer("dynamic_segment_length", default.segment_length, "Tokens a step.")


if __name__ == "__main__":
    _define_flags()
    command.run_command(main)
