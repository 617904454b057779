"""Measure the loss of a trained model, or an ensemble, on a text, as the flags say."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lstm_jax import dynamic
from lstm_jax import loss as loss_lib
from lstm_jax.data import sources, texts
from lstm_jax.data.encoding import Text
from lstm_jax.errors import UserError, warn
from lstm_jax.run import advice, ensemble, figures, workdir, zero_state
from lstm_jax.vocabulary import FILE_END, UNKNOWN_ID, Ids, Vocabulary


class Options(NamedTuple):
    """The flags of the command, checked; see there."""

    splits: str  # One, or several joined by "+".
    text: str | None  # A file, or "-"; then `splits` is not measured.
    json_lines: bool
    context: int | None
    by_position: Path | None
    zero_state: int  # The number of positions, or 0.
    dynamic: dynamic.Settings | None


def measure(
    directories: Sequence[Path], dtype: str | None, own_text: Sequence[str | None], options: Options
) -> None:
    """Print the loss, as one JSON object.

    Args:
      directories: working directories, more than one for an ensemble.
      dtype: of matmuls, or None for that of the runs.
      own_text: the path, dataset and directory of `texts.load_texts_of_run`.
      options: what to measure.

    Raises:
      UserError: if a run or text can't be read, the text is too short or unknown to the model, or
        the model has diverged.
    """
    trained, steps = ensemble.load_ensemble(directories, dtype)
    model, params, vocabulary = trained.model, trained.params, trained.vocabulary
    names = options.splits.split("+")
    splits: dict[str, Text] = {}
    if not options.text or options.dynamic:
        splits = texts.load_texts_of_run(trained.config.data, *own_text)
    measured = (
        [_read_text(options.text, vocabulary)] if options.text else [splits[n] for n in names]
    )
    parts = [text.encode(vocabulary) for text in measured]
    ids: Ids = parts[0] if len(parts) == 1 else np.concatenate([part[:] for part in parts])
    name = "standard input" if options.text == "-" else options.text or options.splits
    result: dict[str, object] = {"text" if options.text else "split": name}
    if len(ids) < (needed := 4 if options.zero_state else 2):
        raise UserError(
            f"{name} is too short: it has {len(ids)} {vocabulary.token_name}s, and {needed} "
            "are needed"
        )
    if options.text:
        result["unknown_tokens"] = int(np.count_nonzero(ids[:] == UNKNOWN_ID))
        if result["unknown_tokens"] == len(ids):
            raise UserError(f"the model knows none of the {vocabulary.token_name}s in {name}")
    loss, losses, used = _measure_loss(trained, ids, splits, options)
    if math.isnan(loss):
        which = " or ".join(map(str, directories))
        remedy = "use a lower --dynamic_learning_rate"
        if not options.dynamic:
            remedy = "train again with a lower optimizer.learning_rate"
        raise UserError(f"the loss is not a number: the model in {which} has diverged; {remedy}")
    sizes = [text.get_size(vocabulary, first=i > 0) for i, text in enumerate(measured)]
    result |= used | {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": loss_lib.compute_bits_per_character(loss, sizes),
        "perplexity": loss_lib.compute_perplexity(loss),
        "tokens": len(ids) - 1,
        "step": steps[0] if len(steps) == 1 else steps,
    }
    if (plot := options.by_position) and options.context:
        by_position = loss_lib.average_by_position(losses, options.context)
        kept = loss_lib.compute_loss(model, params, ids)
        result |= {"loss_with_carry": kept, "by_position": by_position.round(6).tolist()}
    zero = None
    if options.zero_state:
        zero = zero_state.measure_zero_state(model, params, ids, options.zero_state)
        result["zero_state"] = zero._asdict()
    if warning := advice.find_suspicion({name: loss}, len(vocabulary), zero):
        warn(warning)
    if options.json_lines:
        _print_tokens([vocabulary.tokens[i] for i in ids[:]], losses)
    # JSON has no infinity.
    print(json.dumps({key: None if v == math.inf else v for key, v in result.items()}))
    if plot:
        figures.plot_positions(by_position, kept, plot)


def _measure_loss(
    trained: workdir.Trained, ids: Ids, splits: Mapping[str, Text], options: Options
) -> tuple[float, np.ndarray, dict[str, object]]:
    """Measure the loss as the options specify.

    Return the mean loss, the loss of each token ([] where no option needs it), and the fields of
    the result that name the settings.
    """
    model, params, vocabulary = trained.model, trained.params, trained.vocabulary
    if settings := options.dynamic:
        train_ids = splits["train"].encode(vocabulary)
        members = ensemble.list_members(model, params)
        parts = [*dynamic.adapt_to_text(members, train_ids, ids, settings)]
        total = sum(float(part.sum(dtype=np.float64)) for part in parts)
        return total / (len(ids) - 1), np.concatenate(parts), {"dynamic": settings._asdict()}
    if options.context or options.json_lines:
        losses = loss_lib.compute_token_losses(model, params, ids, options.context)
        used: dict[str, object] = {"context": options.context} if options.context else {}
        return float(losses.mean(dtype=np.float64)), losses, used
    return loss_lib.compute_loss(model, params, ids), np.zeros(0), {}


def _read_text(path: str, vocabulary: Vocabulary) -> Text:
    """Read a text from a file or standard input, as a run with this vocabulary reads its own."""
    text = sources.read_argument(path, "--text", vocabulary.kind == "bytes")
    if vocabulary.stop == FILE_END:
        sources.check_ends(text.encode("utf-8", "surrogateescape"), f"{path} (--text)")
        text += FILE_END
    return Text(text, vocabulary.kind, vocabulary.stop)


def _print_tokens(tokens: Sequence[str], losses: np.ndarray) -> None:
    """Print a line of JSON for each token; the first one is not predicted."""
    for token, loss in zip(tokens, [None, *losses.tolist()], strict=True):
        line = {"token": token, "log_probability": None if loss is None else round(-loss, 6)}
        print(json.dumps(line).replace("\x7f", "\\u007f"))  # The only control character left.
