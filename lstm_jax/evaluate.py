"""How well a model predicts a text: `python -m lstm_jax.evaluate --workdir DIR --split test`."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from lstm_jax import command, corpus, workdir
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError

# Tokens read by one call of the compiled function.
_CHUNK = 1024


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    inputs: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    carry: model_lib.Carry,
) -> tuple[jax.Array, model_lib.Carry]:
    """The summed loss (nats) of the `counted` targets [1, time], and the carry after the inputs."""
    logits, carry = model_lib.apply(model, params, inputs, carry)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses, where=counted), carry


def mean_loss(model: model_lib.LanguageModel, params: model_lib.Params, ids: np.ndarray) -> float:
    """The loss over a text read from its start to its end, in nats per token.

    The carry is handed on all the way, so every token is predicted from the whole text before it.
    Every token but the first, which nothing comes before, is predicted once.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, int32 [n], n at least 2.
    """
    inputs, targets = ids[:-1], ids[1:]
    carry = model.initial_carry(1)
    total = 0.0
    for start in range(0, len(targets), _CHUNK):
        # The last chunk is filled up, uncounted, so that one compiled function serves all.
        chunk = slice(start, start + _CHUNK)
        missing = max(0, start + _CHUNK - len(targets))
        loss, carry = _read(
            model,
            params,
            np.pad(inputs[chunk], (0, missing))[None],
            np.pad(targets[chunk], (0, missing))[None],
            (np.arange(_CHUNK) < _CHUNK - missing)[None],
            carry,
        )
        total += float(loss)
    return total / len(targets)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def describe(loss: float) -> str:
    """A loss in nats per token, in bits per token, and as a perplexity."""
    return (
        f"{loss:.4f} nats per character, {loss / math.log(2):.4f} bits per character, "
        f"perplexity {perplexity(loss):.3f}"
    )


def main() -> None:
    """Prints the loss of a trained model on a split, as one JSON object."""
    if flags.FLAGS.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    trained = workdir.load(Path(flags.FLAGS.workdir))
    data = trained.config.data
    if flags.FLAGS.data_path is not None:
        data.path = flags.FLAGS.data_path
    splits = corpus.read(data)
    corpus.check_unchanged(splits, data)
    ids = trained.vocabulary.encode(splits[flags.FLAGS.split])
    loss = mean_loss(trained.model, trained.params, ids)
    result = {
        "split": flags.FLAGS.split,
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "perplexity": perplexity(loss),
        "tokens": len(ids) - 1,
        "step": trained.step,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Working directory of a training run.")
    flags.DEFINE_enum("split", "test", corpus.SPLITS, "Which part of the text to read.")
    flags.DEFINE_string(
        "data_path", None, "Where the run's own text is now, if it was moved since."
    )
    command.run(main)
