"""Measure a trained model on a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

import json
import math

from absl import flags

from lstm_jax.errors import UserError
from lstm_jax.run import command

_RUN, _TEXT_OF_RUN = command.define_run_flags(), command.define_text_flag()
_DTYPE = command.define_dtype_flag()
_SPLIT = flags.DEFINE_enum(
    "split",
    "test",
    ["train", "validation", "test", "validation+test"],
    "The split to measure; validation+test joins both to one text.",
)
_TEXT = flags.DEFINE_string(
    "text", None, "Instead of --split: a file with any text to measure; - is standard input."
)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Read windows of this number of tokens, each from a zero state.", 1
)
_DYNAMIC = flags.DEFINE_bool(
    "dynamic", False, "Dynamic evaluation: train on each segment of the text after predicting it."
)
# Close to the best on the validation splits of experiments/quick.py and penn_treebank_words.py:
# docs/results.md has the others tried.
_RATE = flags.DEFINE_float("dynamic_learning_rate", 1e-3, "Rate of the gradient steps.", 0.0)
_DECAY = flags.DEFINE_float("dynamic_decay", 0.003, "Share of the way back, after each step.", 0.0)
_SEGMENT = flags.DEFINE_integer("dynamic_segment_length", 50, "Tokens per step of --dynamic.", 1)
_EPSILON = flags.DEFINE_float(
    "dynamic_epsilon", None, "[default: 0.1, or 1 for 1,000 tokens or more]", 1e-9
)


def main() -> None:
    """Print the loss of a trained model, or an ensemble, on a text, as one JSON object."""
    directories = _RUN()
    if _CONTEXT.value and _DYNAMIC.value:
        raise UserError("--context and --dynamic can't be combined: use only one of them")
    if _TEXT.value and _SPLIT.present:
        raise UserError("--text and --split can't be combined: use only one of them")
    names = [f"--{flag.name}" for flag in (_RATE, _DECAY, _SEGMENT, _EPSILON) if flag.present]
    if names and not _DYNAMIC.value:
        raise UserError(f"{names[0]} is a setting of dynamic evaluation: add --dynamic")
    # Here, because they import JAX.
    from lstm_jax import dynamic
    from lstm_jax import loss as loss_lib
    from lstm_jax.data import texts
    from lstm_jax.ensemble import list_members
    from lstm_jax.run.run import load
    from lstm_jax.vocabulary import UNKNOWN_ID

    run = load(directories, _DTYPE.value)
    model, params, vocabulary = run.model, run.params, run.vocabulary
    if not _TEXT.value or _DYNAMIC.value:
        splits = texts.load_texts_of_run(run.config.data, _TEXT_OF_RUN.value)
    if _TEXT.value:  # It is read as a run with this vocabulary reads its own text.
        text = texts.read_argument(_TEXT.value, "--text", vocabulary.kind, vocabulary.stop)
        ids = text.encode(vocabulary)
        name = "standard input" if _TEXT.value == "-" else _TEXT.value
        if len(ids) < 2:
            length = f"{len(ids)} {vocabulary.token_name}s, and needs 2"
            raise UserError(f"{name} is too short: it has {length}")
        result = {"text": name, "unknown_tokens": int((ids == UNKNOWN_ID).sum())}
    else:
        parts = [splits[name] for name in _SPLIT.value.split("+")]
        text = parts[0]._replace(name=_SPLIT.value, end=parts[-1].end)
        ids, result = text.encode(vocabulary), {"split": _SPLIT.value}
    if _DYNAMIC.value:
        epsilon = _EPSILON.value or (0.1 if len(vocabulary) < 1000 else 1.0)
        settings = dynamic.Settings(_RATE.value, _DECAY.value, _SEGMENT.value, epsilon)
        train_ids = splits["train"].encode(vocabulary)
        losses = dynamic.adapt_to_text(list_members(model, params), train_ids, ids, settings)
        loss = float(losses.mean(dtype="float64"))
        result["dynamic"] = settings._asdict()
    else:
        loss = loss_lib.compute_loss(model, params, ids, _CONTEXT.value)
        result |= {"context": _CONTEXT.value} if _CONTEXT.value else {}
    if math.isnan(loss):
        raise UserError(
            "the loss is not a number: lower --config.optimizer.learning_rate in training, or "
            "--dynamic_learning_rate"
        )
    perplexity, size = loss_lib.compute_perplexity(loss), text.measure(vocabulary, ids)
    result |= {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": loss_lib.compute_bits_per_character(loss, size),
        "perplexity": None if perplexity == math.inf else perplexity,  # JSON has no infinity.
        "tokens": len(ids) - 1,
        "step": run.step,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    command.run_command(main)
