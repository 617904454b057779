"""Lets a model write: `python -m lstm_jax.sample --workdir DIR --prompt "ROMEO:"`."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lstm_jax import command, workdir
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.vocabulary import SPECIAL_IDS, Vocabulary


@functools.partial(jax.jit, static_argnames=("model", "length"))
def generate(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    prompts: jax.Array,
    key: jax.Array,
    temperature: jax.Array | float,
    length: int,
) -> jax.Array:
    """Continues each prompt with the model's own samples, one token at a time.

    The carry after the prompt and the logits of its last position start a scan in which each token
    is drawn from softmax(logits / temperature) and read in its turn. "" and "[UNK]" are never
    drawn. What member b of the batch draws depends on `key` and b, not on the size of the batch.

    Args:
      model: the model.
      params: its parameters.
      prompts: int32 [batch, time], time at least 1.
      key: PRNG key.
      temperature: 1 samples from the model's own distribution, less is safer, 0 always takes the
        likeliest token.
      length: how many tokens to write.

    Returns:
      The tokens written, without the prompts: int32 [batch, length].
    """
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(len(prompts)))
    special = jnp.array(SPECIAL_IDS)

    def draw(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = logits.at[:, special].set(-jnp.inf)
        noisy = jax.vmap(jax.random.categorical)(
            jax.vmap(jax.random.fold_in, (0, None))(keys, position),
            logits / jnp.where(temperature == 0, 1, temperature),
        )
        return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), noisy).astype(jnp.int32)

    def step(
        state: tuple[jax.Array, model_lib.Carry], position: jax.Array
    ) -> tuple[tuple[jax.Array, model_lib.Carry], jax.Array]:
        logits, carry = state
        ids = draw(logits, position)
        return read(ids, carry), ids

    read = model_lib.make_step(model, params)
    logits, carry = model_lib.apply(model, params, prompts, model.initial_carry(len(prompts)))
    _, ids = jax.lax.scan(step, (logits[:, -1], carry), jnp.arange(length))
    return ids.T


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> np.ndarray:
    """The ids of a prompt, int32 [n]; of an empty one those of a line break, which starts anew."""
    if prompt:
        return vocabulary.encode(prompt)
    start = vocabulary.encode("\n")
    # A text without line breaks: start from its first character in code-point order.
    return start if start[0] not in SPECIAL_IDS else np.array([len(SPECIAL_IDS)], np.int32)


def write(
    model: model_lib.LanguageModel,
    params: model_lib.Params,
    vocabulary: Vocabulary,
    key: jax.Array,
    *,
    prompt: str,
    length: int,
    temperature: float,
    num_samples: int = 1,
) -> list[str]:
    """`num_samples` different continuations of `prompt`, each the prompt and `length` tokens."""
    prompts = np.tile(encode_prompt(vocabulary, prompt), (num_samples, 1))
    ids = np.asarray(generate(model, params, prompts, key, temperature, length))
    return [prompt + vocabulary.decode(row) for row in ids]


def main() -> None:
    """Prints samples of a trained model on standard output."""
    options = flags.FLAGS
    if options.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    trained = workdir.load(Path(options.workdir))
    unknown = trained.vocabulary.unknown(options.prompt)
    if unknown:
        print(
            f"warning: the model does not know {', '.join(map(repr, unknown))} in the prompt and "
            "reads [UNK] instead",
            file=sys.stderr,
        )
    texts = write(
        trained.model,
        trained.params,
        trained.vocabulary,
        jax.random.key(options.seed),
        prompt=options.prompt,
        length=options.length,
        temperature=options.temperature,
        num_samples=options.num_samples,
    )
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(f"\n{'-' * 20}\n".join(texts), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Working directory of a training run.")
    flags.DEFINE_string("prompt", "", "Text to go on from.")
    flags.DEFINE_integer(
        "length", 500, "How many characters to write.", lower_bound=1, upper_bound=10**6
    )
    flags.DEFINE_float(
        "temperature", 0.8, "Less is safer, more is wilder; 0 is greedy.", lower_bound=0
    )
    flags.DEFINE_integer(
        "seed", 0, "The same seed writes the same text.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer(
        "num_samples", 1, "How many texts to write, a line of dashes between.", lower_bound=1
    )
    command.run(main)
