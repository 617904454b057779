"""Generate text: `python -m lstm_jax.sample --workdir DIR --prompt "ROMEO:"`."""

import signal
import sys

from absl import flags

from lstm_jax.run import command

_RUN = command.define_run_flags()
_DTYPE = command.define_dtype_flag()
_PROMPT = flags.DEFINE_string("prompt", "", "Prompt to continue.")
_LENGTH = flags.DEFINE_integer("length", 500, "Maximum number of tokens to generate.")
_CONTROLS = (
    flags.DEFINE_float("temperature", 0.8, "Divide the logits by this; 0: greedy."),
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all."),
    flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set with this probability."),
    flags.DEFINE_float("min_p", 0.0, "Least probability, relative to the maximum."),
)
_STOP = flags.DEFINE_boolean("stop", True, "End at the stop token, if the model has one.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Number of texts, with dashes between.")


def main() -> None:
    """Print samples of a trained model."""
    directories = _RUN()
    # Here, because they import JAX, which --help does not need.
    import jax

    from lstm_jax import generation
    from lstm_jax.generation import Controls, check_number
    from lstm_jax.run.messages import make_printable
    from lstm_jax.run.run import load

    for flag in (*_CONTROLS, _LENGTH, _SEED, _NUM_SAMPLES):  # Before loading the model.
        check_number(flag.name, flag.value)

    run, prompt = load(directories, _DTYPE.value), _PROMPT.value
    run.warn_of_unknown(prompt)

    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    chunks: list[list[str]] = []
    print(make_printable(prompt), end="", flush=True)
    for pieces in generation.stream_texts(
        run.model,
        run.params,
        run.vocabulary,
        jax.random.key(_SEED.value),
        prompt=prompt,
        length=_LENGTH.value,
        controls=Controls(*(flag.value for flag in _CONTROLS)),
        stop_token=_STOP.value,
        num_samples=_NUM_SAMPLES.value,
    ):
        # Print the first text as it is generated, the others at the end.
        print(make_printable(pieces[0]), end="", flush=True)
        chunks.append(pieces)
    print()
    samples = ["".join(text) for text in zip(*chunks, strict=True)]
    for text in samples[1:]:
        print(f"{'-' * 20}\n{make_printable(prompt + text)}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it.
    command.run_command(main)
