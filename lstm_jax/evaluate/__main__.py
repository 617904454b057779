"""Measure a trained model on a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import json
import math

from absl import flags

from lstm_jax.data.standard_texts import SPLITS
from lstm_jax.errors import UserError, warn
from lstm_jax.run import command
from lstm_jax.vocabulary import UNKNOWN_ID

_RUN, _TEXT_OF_RUN = command.define_run_flags(), command.define_text_flags()
_DTYPE = command.define_dtype_flag()
_SPLIT = flags.DEFINE_string(
    "split",
    "test",
    "The split to measure: train, validation or test; validation+test joins both to one text.",
)
_TEXT = flags.DEFINE_string(
    "text", None, "Instead of --split: a file with any text to measure; - is standard input."
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Read the text in consecutive windows of this number of tokens, each from a zero state.",
    lower_bound=1,
    upper_bound=10**9,
)
_DYNAMIC = flags.DEFINE_bool(
    "dynamic",
    False,
    "Dynamic evaluation: train the model on each segment of the text after predicting it.",
)
# The best of a dozen settings on the validation split of experiments/quick.py, as defaults: `python
# -m lstm_jax.evaluate --workdir runs/quick --split validation --dynamic` gives 1.259 nats per
# character, and without --dynamic 1.349.
_DYNAMIC_LEARNING_RATE = flags.DEFINE_float(
    "dynamic_learning_rate", 1e-3, "Learning rate of --dynamic."
)
_DYNAMIC_DECAY = flags.DEFINE_float(
    "dynamic_decay",
    0.003,
    "Fraction of the distance to the trained parameters that each step of --dynamic removes.",
)
_DYNAMIC_SEGMENT_LENGTH = flags.DEFINE_integer(
    "dynamic_segment_length", 50, "Tokens per step of --dynamic.", lower_bound=1, upper_bound=10**9
)


def check_flags() -> None:
    """Raise `UserError` for a value that is not allowed, or flags that contradict each other."""
    if _TEXT.value and flags.FLAGS["split"].present:
        raise UserError("--text and --split can't be combined: leave one out")
    if unknown := [name for name in _SPLIT.value.split("+") if name not in SPLITS]:
        raise UserError(
            f"there is no split {unknown[0]!r}: --split is {', '.join(SPLITS)}, or several "
            "joined by +"
        )
    if not all(0 <= x < math.inf for x in (_DYNAMIC_LEARNING_RATE.value, _DYNAMIC_DECAY.value)):
        raise UserError("--dynamic_learning_rate and --dynamic_decay must be 0 or more, and finite")
    given = [
        name for name in flags.FLAGS if name.startswith("dynamic_") and flags.FLAGS[name].present
    ]
    if given and not _DYNAMIC.value:
        raise UserError(f"--{given[0]} has no effect without --dynamic: add that")
    if _CONTEXT.value and _DYNAMIC.value:
        raise UserError("--context and --dynamic can't be combined: use only one of them")


def main() -> None:
    """Print the loss of a trained model, or an ensemble, on a text, as one JSON object."""
    directories, own_text = _RUN(), _TEXT_OF_RUN()
    check_flags()
    # Here, because they import JAX.
    from lstm_jax import dynamic
    from lstm_jax.data import texts
    from lstm_jax.evaluate import measurement
    from lstm_jax.run import advice, ensemble

    trained, steps = ensemble.load_ensemble(directories, _DTYPE.value)
    vocabulary, result = trained.vocabulary, dict[str, object]()
    splits = {}
    if not _TEXT.value or _DYNAMIC.value:
        splits = texts.load_texts_of_run(trained.config.data, *own_text)
    if _TEXT.value:
        subject = measurement.load_file(_TEXT.value, vocabulary)
        unknown = subject.ids[:] == UNKNOWN_ID
        result |= {"text": subject.name, "unknown_tokens": int(unknown.sum())}
    else:
        subject = measurement.join_splits(_SPLIT.value, splits, vocabulary)
        result["split"] = subject.name
    if _DYNAMIC.value:
        settings = dynamic.Settings(
            _DYNAMIC_LEARNING_RATE.value, _DYNAMIC_DECAY.value, _DYNAMIC_SEGMENT_LENGTH.value
        )
        train_ids = splits["train"].encode(vocabulary)
        loss = measurement.measure_dynamic_loss(trained, subject.ids, train_ids, settings)
        result["dynamic"], remedy = settings._asdict(), "use a lower --dynamic_learning_rate"
    else:
        loss = measurement.measure_loss(trained, subject.ids, _CONTEXT.value)
        result |= {"context": _CONTEXT.value} if _CONTEXT.value else {}
        remedy = "train again with a lower optimizer.learning_rate"
    if math.isnan(loss):
        which = " or ".join(map(str, directories))
        raise UserError(f"the loss is not a number: the model in {which} has diverged; {remedy}")
    if warning := advice.find_suspicion({subject.name: loss}, len(vocabulary)):
        warn(warning)
    result |= measurement.report_loss(subject, loss)
    print(json.dumps(result | {"step": steps[0] if len(steps) == 1 else steps}))


if __name__ == "__main__":
    command.run_command(main)
