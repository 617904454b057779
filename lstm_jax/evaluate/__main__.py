"""Measure a trained model on a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lstm_jax import dynamic
from lstm_jax import loss as loss_lib
from lstm_jax.data import sources, texts
from lstm_jax.data.encoding import Text
from lstm_jax.errors import UserError, warn
from lstm_jax.evaluate.temperature import Tempered, fit_temperature
from lstm_jax.run import advice, command, ensemble, figures, workdir, zero_state
from lstm_jax.vocabulary import FILE_END, UNKNOWN_ID, Ids, Vocabulary

_PLACES = 256  # The number of positions that --zero_state measures.

_RUN = command.define_run_flags()
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
_FIT_TEMPERATURE = flags.DEFINE_bool(
    "fit_temperature",
    False,
    "Divide the logits by the temperature with the smallest loss on the validation split.",
)
_ZERO_STATE = flags.DEFINE_bool(
    "zero_state",
    False,
    f"Also measure the loss from a zero state, at {_PLACES} positions of the split.",
)
_DYNAMIC = flags.DEFINE_bool(
    "dynamic",
    False,
    "Dynamic evaluation: train the model on each segment of the text after predicting it.",
)
_DYNAMIC_LEARNING_RATE = flags.DEFINE_float(
    "dynamic_learning_rate", dynamic.Settings().learning_rate, "Learning rate of --dynamic."
)
_DYNAMIC_DECAY = flags.DEFINE_float(
    "dynamic_decay",
    dynamic.Settings().decay,
    "Fraction of the distance to the trained parameters that each step of --dynamic removes.",
)
_DYNAMIC_SEGMENT_LENGTH = flags.DEFINE_integer(
    "dynamic_segment_length",
    dynamic.Settings().segment_length,
    "Tokens per step of --dynamic.",
    lower_bound=1,
    upper_bound=10**9,
)


def main() -> None:
    """Print the loss of a trained model on a text, as one JSON object."""
    directories, own_text = _RUN()
    if _TEXT.value and flags.FLAGS["split"].present:
        raise UserError("--text and --split can't be combined: leave one out")
    names = _SPLIT.value.split("+")
    if unknown := [name for name in names if name not in sources.SPLITS]:
        raise UserError(
            f"there is no split {unknown[0]!r}: --split is {', '.join(sources.SPLITS)}, or several "
            "joined by +"
        )
    settings = dynamic.Settings(
        _DYNAMIC_LEARNING_RATE.value, _DYNAMIC_DECAY.value, _DYNAMIC_SEGMENT_LENGTH.value
    )
    if not all(0 <= number < math.inf for number in settings):
        raise UserError("--dynamic_learning_rate and --dynamic_decay must be 0 or more, and finite")
    if bool(_CONTEXT.value) + _FIT_TEMPERATURE.value + _DYNAMIC.value > 1:
        raise UserError(
            "--context, --fit_temperature and --dynamic can't be combined: use only one of them"
        )
    plot = Path(_BY_POSITION.value) if _BY_POSITION.value else None
    if plot and not _CONTEXT.value:
        raise UserError("--by_position needs windows: add --context 256")
    if plot and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise UserError(f"--by_position is {plot}: name a .png file in an existing directory")

    trained, steps = ensemble.load_ensemble(directories, _DTYPE.value)
    model, params, vocabulary = trained.model, trained.params, trained.vocabulary
    splits: dict[str, Text] = {}
    if not _TEXT.value or _DYNAMIC.value or _FIT_TEMPERATURE.value:
        splits = texts.load_texts_of_run(trained.config.data, *own_text)
    measured = [_read_text(_TEXT.value, vocabulary)] if _TEXT.value else [splits[n] for n in names]
    ids = texts.Joined([text.encode(vocabulary) for text in measured])
    name = "standard input" if _TEXT.value == "-" else _TEXT.value or _SPLIT.value
    result: dict[str, object] = {"text" if _TEXT.value else "split": name}
    if len(ids) < (needed := 4 if _ZERO_STATE.value else 2):
        raise UserError(
            f"{name} is too short: it has {len(ids)} {vocabulary.token_name}s, and {needed} "
            "are needed"
        )
    if _TEXT.value:
        result["unknown_tokens"] = int(np.count_nonzero(ids[:] == UNKNOWN_ID))
        if result["unknown_tokens"] == len(ids):
            raise UserError(f"the model knows none of the {vocabulary.token_name}s in {name}")
    loss, losses, used = _measure_loss(trained, ids, splits, settings)
    if math.isnan(loss):
        raise UserError(
            f"the loss is not a number: the model in {' or '.join(map(str, directories))} has "
            "diverged; train again with a lower optimizer.learning_rate"
        )
    costs = [text.costs(vocabulary, first=i > 0) for i, text in enumerate(measured)]
    result |= used | {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": loss_lib.compute_bits_per_character(loss, costs),
        "perplexity": loss_lib.compute_perplexity(loss),
        "tokens": len(ids) - 1,
        "step": steps[0] if len(steps) == 1 else steps,
    }
    if plot:
        by_position = loss_lib.average_by_position(losses, _CONTEXT.value)
        kept = loss_lib.compute_loss(model, params, ids)
        result |= {"loss_with_carry": kept, "by_position": by_position.round(6).tolist()}
    zero = None
    if _ZERO_STATE.value:
        zero = zero_state.measure_zero_state(model, params, ids, _PLACES)
        result["zero_state"] = zero._asdict()
    if warning := advice.find_suspicion({name: loss}, len(vocabulary), zero):
        warn(warning)
    if _FIT_TEMPERATURE.value and not _TEXT.value and "validation" in names:
        warn(
            "the temperature was fitted on the validation split, so the loss there is too low: "
            "measure with --split test"
        )
    if _JSON_LINES.value:
        _print_tokens([vocabulary.tokens[i] for i in ids[:]], losses)
    # JSON has no infinity.
    print(json.dumps({key: None if v == math.inf else v for key, v in result.items()}))
    if plot:
        figures.plot_positions(by_position, kept, plot)


def _measure_loss(
    trained: workdir.Trained, ids: Ids, splits: Mapping[str, Text], settings: dynamic.Settings
) -> tuple[float, np.ndarray, dict[str, object]]:
    """Measure the loss as the flags specify.

    Return the mean loss, the loss of each token ([] unless a flag needs it), and the fields of the
    result that name the settings.
    """
    model, params, vocabulary = trained.model, trained.params, trained.vocabulary
    if _DYNAMIC.value:
        train_ids = splits["train"].encode(vocabulary)
        total, kept = 0.0, [np.zeros(0, np.float32)]
        for part in ensemble.adapt_to_text(model, params, train_ids, ids, settings):
            total += float(part.sum(dtype=np.float64))
            if _JSON_LINES.value:
                kept.append(part)
        return total / (len(ids) - 1), np.concatenate(kept), {"dynamic": settings._asdict()}
    if _CONTEXT.value:
        losses = loss_lib.compute_token_losses(model, params, ids, _CONTEXT.value)
        return float(losses.mean(dtype=np.float64)), losses, {"context": _CONTEXT.value}
    measured: Any = model
    used: dict[str, object] = {}
    if _FIT_TEMPERATURE.value:
        validation = splits["validation"].encode(vocabulary)
        temperature = fit_temperature(model, params, validation)
        measured, used = Tempered(model, temperature), {"temperature": temperature}
    if _JSON_LINES.value:
        losses = loss_lib.compute_token_losses(measured, params, ids)
        return float(losses.mean(dtype=np.float64)), losses, used
    return loss_lib.compute_loss(measured, params, ids), np.zeros(0), used


def _read_text(path: str, vocabulary: Vocabulary) -> Text:
    """Read a text from a file or standard input, as a run with this vocabulary reads its own."""
    text = sources.read_argument(path, "--text", vocabulary.kind == "bytes")
    if vocabulary.stop == FILE_END:
        sources.check_ends(text, 0)
        text += FILE_END
    return Text(text)


def _print_tokens(tokens: Sequence[str], losses: np.ndarray) -> None:
    """Print a line of JSON for each token; the first one is not predicted."""
    for token, loss in zip(tokens, [None, *losses.tolist()], strict=True):
        line = {"token": token, "log_probability": None if loss is None else round(-loss, 6)}
        print(json.dumps(line).replace("\x7f", "\\u007f"))  # The only control character left.


if __name__ == "__main__":
    command.run_command(main)
