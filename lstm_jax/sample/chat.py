"""A conversation with a model, line by line: `python -m lstm_jax.sample --interactive`."""

import sys
from collections.abc import Iterator

import jax
import numpy as np

from lstm_jax import generation
from lstm_jax.controls import Controls, make_control_arrays, make_stop_table
from lstm_jax.errors import UserError
from lstm_jax.generation import State, generate_chunks, text_decoder
from lstm_jax.model import Params, StepArrays
from lstm_jax.run import interrupts
from lstm_jax.run.workdir import Trained
from lstm_jax.vocabulary import make_printable, make_printer

# What a command changes: its name, and of what type its value is.
_SETTINGS = {
    "length": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "repetition_window": int,
}
HELP = """\
A line is read, and the model goes on from all that was read and written so far.
After an empty line it just goes on. A line that begins with a slash is a command:
  /temperature 0.5  changes the temperature; likewise /length, /top_k, /top_p, /min_p,
                    /repetition_penalty, /repetition_window
  /next             shows the five likeliest next units, with the model's own probabilities
  /undo             takes the last line back, with what was written after it
  /reset            forgets all that was read and written
  /quit             ends, as the end of the input does
Two slashes begin a line of text that itself begins with one."""


def converse(
    trained: Trained,
    key: jax.Array,
    *,
    prompt: str,
    length: int,
    controls: Controls,
    stop_token: bool,
    stop_at: str,
) -> None:
    """Reads lines from standard input and answers each on standard output.

    Ctrl-C ends what is being written, or at the beginning of a line the conversation.

    Args:
      trained: the model.
      key: PRNG key.
      prompt: read, and gone on from, before the first line, unless it is empty.
      length: how many units to write after each line at most, until a command changes it.
      controls: how they are drawn, likewise.
      stop_token: see `generation.stream_texts`.
      stop_at: likewise.
    """
    stops = make_stop_table(trained.vocabulary, stop_token, stop_at)
    arrays = generation.prepare_params(trained.model, trained.params)
    state = generation.initial_state(trained.model)
    before: list[State] = []  # The states that /undo leads back to.

    def answer(line: str, turn: int) -> State:
        """Reads a line and prints what the model goes on with; the state after it."""
        last = _read(trained, arrays, state, line)
        decode, show = text_decoder(trained.vocabulary, stop_token), make_printer()
        chunks = generate_chunks(
            trained.model,
            arrays,
            last,
            jax.random.fold_in(key, turn),  # After /undo the same line is answered otherwise.
            make_control_arrays(controls, len(trained.vocabulary)),
            stops,
            length,
        )
        try:
            for ids, after in chunks:
                print(show(decode(ids[0], False), False), end="", flush=True)
                last = after
        except KeyboardInterrupt:
            interrupts.answer()  # What was written so far stands.
        print(show(decode((), True), True), flush=True)
        return last

    if prompt:
        print(make_printable(prompt), end="", flush=True)
        before, state = [state], answer(prompt, turn=0)
    for turn, line in enumerate(_lines(), start=1):
        name, _, value = line[1:].strip().partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            before.append(state)
            state = answer(line.removeprefix("/"), turn)
        elif name == "quit":
            return
        elif name == "help":
            print(HELP, flush=True)
        elif name == "next":
            print(_likeliest(trained, arrays, state), flush=True)
        elif name == "reset":
            state, before = generation.initial_state(trained.model), []
        elif name == "undo" and before:
            state = before.pop()
        elif name == "undo":
            _complain("there is nothing to undo")
        elif name in _SETTINGS:
            try:
                length, controls = _change(length, controls, name, value)
            except UserError as error:
                _complain(str(error))
        else:
            _complain(f"there is no command /{name}: /help names all")


def _lines() -> Iterator[str]:
    """The lines of standard input, asked for where a person types them."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _read(trained: Trained, arrays: StepArrays | Params, state: State, line: str) -> State:
    """The state after a line, or after what an empty first line stands for."""
    if unknown := trained.vocabulary.unknown(line):
        _complain(f"the model does not know {', '.join(map(repr, unknown))} and reads [UNK]")
    if state.position and not line:
        return state
    ids = generation.encode_prompt(trained.vocabulary, line)
    return generation.read_tokens(trained.model, arrays, state, ids[None])


def _likeliest(trained: Trained, arrays: StepArrays | Params, state: State) -> str:
    """The five likeliest next units, a line for each."""
    probabilities = np.asarray(jax.nn.softmax(_read(trained, arrays, state, "").logits[0]))
    ids = np.argsort(-probabilities, kind="stable")[:5]
    return "\n".join(f"{probabilities[i]:.4f}  {trained.vocabulary.tokens[i]!r}" for i in ids)


def _change(length: int, controls: Controls, name: str, value: str) -> tuple[int, Controls]:
    """The length and controls with one of them changed.

    Raises:
      UserError: if the value is no number, or outside the range.
    """
    try:
        number = _SETTINGS[name](value)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[_SETTINGS[name]]
        raise UserError(f"/{name} takes {kind}, not {value!r}") from None
    if name != "length":
        controls = controls._replace(**{name: number})
        make_control_arrays(controls._replace(forbidden=()), vocabulary_size=3)
    elif number < 1:
        raise UserError(f"length is {number}: it must be 1 or more")
    else:
        length = number
    return length, controls
