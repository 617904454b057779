"""How well a model predicts a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

if __name__ == "__main__":
    from lstm_jax import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from lstm_jax import command, corpus, dynamic, texts, workdir
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import Vocabulary

# Tokens of a text that one call of the compiled function reads.
_CHUNK = 1024
# A longer text is read as so many streams side by side, by one call so many tokens of each.
LONGEST_IN_ONE = 2**20
_STREAMS, _STREAMS_CHUNK = 64, 64
# Tokens that a stream reads uncounted before its own, which end the stream before it.
_WARM_UP = 1024

# Tokens that are read from each place of `zero_state`, and before it; and places of a command.
_PLACE_LENGTH = 512
PLACES = 256
# Nats per token that losses of one model hardly ever differ by.
_FAR = 0.7

# Softmax temperatures among which the best is looked for.
_TEMPERATURES = np.linspace(0.7, 1.5, 81)


@functools.partial(jax.jit, static_argnames="model")
def read_chunk(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    carry: model_lib.Carry,
    temperatures: jax.Array,
) -> tuple[jax.Array, model_lib.Carry]:
    """Summed losses (nats) of the `counted` targets at each temperature, and the carry.

    The arrays are [batch, time].
    """
    logits, carry = model_lib.apply(model, params, inputs, carry)

    def summed(temperature: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits / temperature, targets)
        return jnp.sum(losses, where=counted)

    return jax.lax.map(summed, temperatures), carry


def mean_losses(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    ids: texts.Ids,
    temperatures: np.ndarray,
) -> np.ndarray:
    """`mean_loss` with the logits divided by each of the temperatures, from one reading."""
    carry = model.initial_carry(streams(ids))
    total = np.zeros(len(temperatures))
    for inputs, targets, counted in chunks(ids):
        losses, carry = read_chunk(
            model,
            params,
            inputs,
            targets,
            counted,
            carry,
            jnp.asarray(temperatures, jnp.float32),
        )
        total += np.asarray(losses, np.float64)
    return total / (len(ids) - 1)


def streams(ids: texts.Ids) -> int:
    """How many parts of a text are read side by side: one unless it is very long."""
    return 1 if len(ids) <= LONGEST_IN_ONE else _STREAMS


def chunks(ids: texts.Ids) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs, targets and which of them count, [streams, time] each, through a text.

    The last chunks are filled up, uncounted, so that one compiled function serves all.
    """
    number = streams(ids)
    chunk, warm_up = (_CHUNK, 0) if number == 1 else (_STREAMS_CHUNK, _WARM_UP)
    # Stream s predicts the targets from bounds[s] to bounds[s + 1].
    bounds = (len(ids) - 1) * np.arange(number + 1) // number
    # All but the first, which has nothing before it, begin so much earlier than their own targets.
    begins = np.maximum(bounds[:-1] - warm_up, 0)
    for start in range(0, int((bounds[1:] - begins).max()), chunk):
        windows = np.zeros((number, chunk + 1), np.int32)
        for window, begin, end in zip(windows, begins + start, bounds[1:], strict=True):
            read = ids[begin : max(begin, min(begin + chunk, end) + 1)]
            window[: len(read)] = read
        places = begins[:, None] + start + np.arange(chunk)
        counted = (places >= bounds[:-1, None]) & (places < bounds[1:, None])
        yield windows[:, :-1], windows[:, 1:], counted


def mean_loss(model: model_lib.LanguageModel, params: model_lib.Params, ids: texts.Ids) -> float:
    """The loss over a text read from its start to its end, in nats per token.

    The carry is handed on all the way, so every token is predicted from the whole text before it.
    Every token but the first, which nothing comes before, is predicted once.

    A text of more than `LONGEST_IN_ONE` tokens is read as 64 streams side by side, each with the
    1,024 tokens before it read first: so many or more every token is predicted from.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, int32 [n], n at least 2.
    """
    return float(mean_losses(model, params, ids, np.ones(1))[0])


def fit_temperature(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: texts.Ids
) -> float:
    """The softmax temperature, to a hundredth, at which the loss over a text is least."""
    losses = mean_losses(model, params, ids, _TEMPERATURES)
    return float(_TEMPERATURES[losses.argmin()])


class ZeroState(NamedTuple):
    """Losses of a model that begins to read in the middle of a text, in nats per token.

    Each is the mean over the tokens that follow a place of the text, read from a zero carry.

    Attributes:
      mean: over all places.
      worst: the greatest.
      excess: by how much the loss is greater than that of the same tokens read with as many before
        them, at the place where that is most.
    """

    mean: float
    worst: float
    excess: float

    def describe(self, name: str) -> str:
        """Return it in words, for a split of this name."""
        return (
            f"From a zero state within the {name} text: {self.mean:.4f} nats per token, "
            f"{self.worst:.4f} at the worst place; at most {self.excess:+.4f} against reading what "
            "stands before"
        )


def zero_state(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: texts.Ids, places: int
) -> ZeroState:
    """Measure how well a model recovers from the zero carry, with which every sample begins.

    Training on streams hardly ever sees that state, and a model may end up in a state that nothing
    leads out of. The mean loss over a text, read once from its start, does not show it.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, int32 [n], n at least 4.
      places: how many, evenly spread over the text.
    """
    length = min(_PLACE_LENGTH, (len(ids) - 1) // 3)
    chunk = min(_STREAMS_CHUNK, length)
    length -= length % chunk
    starts = np.unique(np.linspace(length, len(ids) - 1 - length, places).astype(int))
    windows = np.stack([ids[start - length : start + length + 1] for start in starts])

    def read(begin: int, carry: model_lib.Carry) -> tuple[np.ndarray, model_lib.Carry]:
        total = np.zeros(len(starts))
        for at in range(begin, begin + length, chunk):
            part = windows[:, at : at + chunk + 1]
            losses, carry = _read_rows(model, params, part[:, :-1], part[:, 1:], carry)
            total += np.asarray(losses, np.float64)
        return total / length, carry

    zero = model.initial_carry(len(starts))
    cold, _ = read(length, zero)
    _, carry = read(0, zero)
    warm, _ = read(length, carry)
    return ZeroState(float(cold.mean()), float(cold.max()), float((cold - warm).max()))


@functools.partial(jax.jit, static_argnames="model")
def _read_rows(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    inputs: jax.Array,
    targets: jax.Array,
    carry: model_lib.Carry,
) -> tuple[jax.Array, model_lib.Carry]:
    """Summed losses (nats) of the targets [batch, time] of each row, and the carry."""
    logits, carry = model_lib.apply(model, params, inputs, carry)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.sum(axis=1), carry


def suspicion(
    losses: Mapping[str, float], vocabulary_size: int, zero: ZeroState | None = None
) -> str | None:
    """Return what is odd about the losses of a trained model, None if nothing is.

    Args:
      losses: nats per token, by split; those of validation and test are of one model.
      vocabulary_size: of the model.
      zero: from `zero_state`.
    """
    guessing = math.log(vocabulary_size)
    for name, loss in losses.items():
        if loss > guessing:
            return (
                f"the {name} loss, {loss:.3f} nats per token, is worse than guessing among the "
                f"{vocabulary_size:,} tokens ({guessing:.3f})"
            )
    validation, test = losses.get("validation"), losses.get("test")
    if validation is not None and test is not None and abs(test - validation) > _FAR:
        return (
            f"the test loss, {test:.3f} nats per token, is far from the validation loss, "
            f"{validation:.3f}: either the texts differ, or the model fails on one of them"
        )
    if zero is not None and zero.excess > _FAR:
        return (
            f"from a zero state the model loses up to {zero.excess:.3f} nats per token more than "
            "with what stands before: raise batches.reset_probability"
        )
    return None


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_character(
    loss: float, vocabulary: Vocabulary, tokens: int, *parts: texts.Text
) -> float:
    """What a loss costs for each Unicode character, so that units of any kind can be compared.

    A unit that the vocabulary lacks was predicted as [UNK] only: it is spelled out besides, with
    eight bits for each byte of its UTF-8 and for an end mark.

    Args:
      loss: nats per token, as `mean_loss` gives it.
      vocabulary: what the text was encoded by.
      tokens: how many were predicted.
      parts: what the loss was measured on, one after the other, with two tokens at the least.
    """
    costs = [part.costs(vocabulary, first=i > 0) for i, part in enumerate(parts)]
    bits = loss / math.log(2) * tokens + 8 * sum(cost.unknown_bytes for cost in costs)
    return bits / sum(cost.characters for cost in costs)


def describe(loss: float, vocabulary: Vocabulary, text: texts.Text) -> str:
    """A loss on `text` in nats and bits per unit, as a perplexity, and in bits per character."""
    name = vocabulary.unit_name
    description = (
        f"{loss:.4f} nats per {name}, {loss / math.log(2):.4f} bits per {name}, "
        f"perplexity {perplexity(loss):.3f}"
    )
    if name != "character":
        bits = bits_per_character(loss, vocabulary, len(text.encode(vocabulary)) - 1, text)
        description += f", {bits:.4f} bits per character"
    return description


def main() -> None:
    """Prints the loss of a trained model on a split, as one JSON object."""
    values = flags.FLAGS
    if values.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    names = values.split.split("+")
    if unknown := [name for name in names if name not in corpus.SPLITS]:
        raise UserError(
            f"there is no split {unknown[0]!r}: --split is {', '.join(corpus.SPLITS)}, or some of "
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
    trained = workdir.load(Path(values.workdir))
    splits = texts.read_again(
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
        sizes = dynamic.gradient_sizes(model, trained.params, read, settings.segment_length)
        loss = dynamic.mean_loss(model, trained.params, ids, settings, sizes)
        result["dynamic"] = settings._asdict()
    else:
        (loss,) = mean_losses(trained.model, trained.params, ids, np.array([temperature])).tolist()
    if math.isnan(loss):
        raise UserError(
            f"the loss is not a number: the model of step {trained.step} in {values.workdir} has "
            "diverged, train it anew with a lower optimizer.learning_rate"
        )
    result |= {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": bits_per_character(loss, trained.vocabulary, len(ids) - 1, *parts),
        "perplexity": perplexity(loss),
        "tokens": len(ids) - 1,
        "step": trained.step,
    }
    zero = None
    if values.zero_state:
        zero = zero_state(trained.model, trained.params, ids, PLACES)
        result["zero_state"] = zero._asdict()
    if warning := suspicion({values.split: loss}, len(trained.vocabulary), zero):
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
    command.run(main)
