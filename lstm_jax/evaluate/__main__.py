"""Measure a trained model on a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import math
from pathlib import Path

from absl import flags

from lstm_jax.data.sources import SPLITS
from lstm_jax.errors import UserError
from lstm_jax.run import command

_POSITIONS = 256  # The number of positions that --zero_state measures.

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
_JSON_LINES = flags.DEFINE_bool(
    "json_lines", False, "First print each token and its log-probability, as a line of JSON each."
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Read the text in consecutive windows of this number of tokens, each from a zero state.",
    lower_bound=1,
    upper_bound=10**9,
)
_BY_POSITION = flags.DEFINE_string(
    "by_position", None, "PNG file for a plot of the loss by position in the window of --context."
)
_ZERO_STATE = flags.DEFINE_bool(
    "zero_state",
    False,
    f"Also measure the loss from a zero state, at {_POSITIONS} positions of the text.",
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


def main() -> None:
    """Print the loss of a trained model on a text, as one JSON object."""
    directories, own_text = _RUN(), _TEXT_OF_RUN()
    if _TEXT.value and flags.FLAGS["split"].present:
        raise UserError("--text and --split can't be combined: leave one out")
    names = _SPLIT.value.split("+")
    if unknown := [name for name in names if name not in SPLITS]:
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
    plot = Path(_BY_POSITION.value) if _BY_POSITION.value else None
    if plot and not _CONTEXT.value:
        raise UserError("--by_position needs windows: add --context 256")
    if plot and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise UserError(f"--by_position is {plot}: name a .png file in an existing directory")

    # Here, because they import JAX.
    from lstm_jax import dynamic
    from lstm_jax.evaluate import measurement

    settings = dynamic.Settings(
        _DYNAMIC_LEARNING_RATE.value, _DYNAMIC_DECAY.value, _DYNAMIC_SEGMENT_LENGTH.value
    )
    options = measurement.Options(
        splits=_SPLIT.value,
        text=_TEXT.value,
        json_lines=_JSON_LINES.value,
        context=_CONTEXT.value,
        by_position=plot,
        zero_state=_POSITIONS if _ZERO_STATE.value else 0,
        dynamic=settings if _DYNAMIC.value else None,
    )
    measurement.measure(directories, _DTYPE.value, own_text, options)


if __name__ == "__main__":
    command.run_command(main)
