"""Lets a model write: `python -m lstm_jax.sample --workdir DIR --prompt "ROMEO:"`.

The text goes to standard output as it is made; all else that is to be said, to standard error.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import sys
from pathlib import Path

import jax
from absl import flags

from lstm_jax import command, generation
from lstm_jax.controls import Controls, can_end, make_control_arrays, make_stop_table
from lstm_jax.data import sources, texts
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.sample import chat, novelty
from lstm_jax.vocabulary import Vocabulary, make_printable, make_printer


def main() -> None:
    """Prints samples of a trained model, or converses."""
    options = flags.FLAGS
    if options.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    if options.prompt and options.prompt_file:
        raise UserError("give either --prompt or --prompt_file")
    if options.interactive and (options.num_samples > 1 or options.prompt_file == "-"):
        raise UserError("--interactive writes one text and reads its lines from standard input")
    if options.interactive and options.novelty:
        raise UserError("--novelty measures whole texts: leave out --interactive")
    controls = Controls(*(options[name].value for name in Controls._fields[:-1]))
    make_control_arrays(
        controls, vocabulary_size=3
    )  # A mistake is told before the model is loaded.

    trained = workdir.load_trained(Path(options.workdir))
    vocabulary = trained.vocabulary
    prompt = options.prompt
    if options.prompt_file:
        any_bytes = vocabulary.kind == "bytes"
        prompt = sources.read_argument(options.prompt_file, "--prompt_file", any_bytes)
    if options.novelty:
        splits = texts.load_texts_of_run(
            trained.config.data, options.data_path, options.dataset, options.data_directory
        )
        training_text = splits["train"]
    controls = controls._replace(forbidden=vocabulary.encode(options.forbid).tolist())
    _warn(vocabulary, "the prompt", prompt)
    _warn(vocabulary, "--forbid", options.forbid)
    forbidden = make_control_arrays(controls, len(vocabulary)).forbidden
    if options.stop_at and not can_end(
        make_stop_table(vocabulary, False, options.stop_at), forbidden
    ):
        print(f"warning: the model can't write {options.stop_at!r} (--stop_at)", file=sys.stderr)

    key = jax.random.key(options.seed)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    if options.interactive:
        # Bytes that are no UTF-8 are units that a model of bytes knows and others don't.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        chat.converse(
            trained,
            key,
            prompt=prompt,
            length=options.length,
            controls=controls,
            stop_token=options.stop,
            stop_at=options.stop_at,
        )
        return
    written = [""] * options.num_samples
    show = make_printer()
    print(show(prompt, False), end="", flush=True)
    pieces = generation.stream_texts(
        trained.model,
        trained.params,
        vocabulary,
        key,
        prompt=prompt,
        length=options.length,
        controls=controls,
        num_samples=options.num_samples,
        stop_token=options.stop,
        stop_at=options.stop_at,
    )
    for piece in pieces:
        # The first text is shown as it comes, the others after it.
        print(show(piece[0], False), end="", flush=True)
        written = [text + more for text, more in zip(written, piece, strict=True)]
    print(show("", True))
    for text in written[1:]:
        print(f"{'-' * 20}\n{make_printable(prompt + text)}")
    sys.stdout.flush()
    if options.novelty:
        for text in written:
            found = novelty.measure_novelty(text, training_text.pieces(overlap=len(text)))
            print(_describe(found), file=sys.stderr)


def _warn(vocabulary: Vocabulary, where: str, text: str) -> None:
    """Says which units of a text the model doesn't know."""
    if unknown := vocabulary.unknown(text):
        named = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        print(
            f"warning: the model does not know {named} in {where} and reads [UNK] instead",
            file=sys.stderr,
        )


def _describe(found: novelty.Novelty) -> str:
    return (
        f"novelty: {found.copied_share:.1%} of the characters stand in runs of more than "
        f"{novelty.COMMON_RUN} copied from the training text; the longest copied run has "
        f"{len(found.longest_run)}: {found.longest_run!r}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Working directory of a training run.")
    flags.DEFINE_string("prompt", "", "Text to go on from.")
    flags.DEFINE_string("prompt_file", None, "A file with the text to go on from; - is stdin.")
    flags.DEFINE_integer(
        "length",
        500,
        "How many characters, words or bytes to write at most.",
        lower_bound=1,
        upper_bound=10**6,
    )
    flags.DEFINE_float("temperature", 0.8, "Less is safer, more is wilder; 0 is greedy.")
    flags.DEFINE_integer("top_k", 0, "Draw from the so many likeliest units only; 0: from all.")
    flags.DEFINE_float(
        "top_p", 1.0, "Draw from the fewest likeliest units with this share of the probability."
    )
    flags.DEFINE_float(
        "min_p", 0.0, "Draw from units at least so many times as likely as the likeliest."
    )
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "Above 1, units that stood lately become less likely."
    )
    flags.DEFINE_integer("repetition_window", 64, "How many units back the penalty looks.")
    flags.DEFINE_string("forbid", "", "Units that are never written, one after the other.")
    flags.DEFINE_boolean("stop", True, "End at the stop token, if the model has learned one.")
    flags.DEFINE_string("stop_at", "", "End as soon as this text was written.")
    flags.DEFINE_integer(
        "seed", 0, "The same seed writes the same text.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer(
        "num_samples",
        1,
        "How many texts to write, a line of dashes between.",
        lower_bound=1,
        upper_bound=10**5,
    )
    flags.DEFINE_boolean("interactive", False, "Converse, line by line; /help says how.")
    flags.DEFINE_boolean("novelty", False, "Tell how much of the text was copied from training.")
    command.define_text_flags()
    command.run_command(main)
