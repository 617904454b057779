"""Chat with a model, line by line: `python -m lstm_jax.sample --interactive`."""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lstm_jax import generation
from lstm_jax.controls import Controls, make_control_arrays, make_stop_table
from lstm_jax.errors import UserError
from lstm_jax.generation import State, generate_chunks, text_decoder
from lstm_jax.model import Params, StepArrays
from lstm_jax.run import interrupts
from lstm_jax.run.streams import make_printable, make_printer
from lstm_jax.run.workdir import Trained

# The settings that commands change, and their types.
_SETTINGS = {"length": int} | {
    name: type(value) for name, value in Controls._field_defaults.items() if name != "forbidden"
}
HELP = """\
The model reads each line and continues the whole text so far. After an empty line it continues
without reading anything. A line that begins with a slash is a command:
  /temperature 0.5  sets the temperature; likewise /length, /top_k, /top_p, /min_p,
                    /repetition_penalty, /repetition_window
  /next             shows the five most likely next tokens and their probabilities
  /undo             removes the last line and the text generated after it
  /reset            removes the whole text
  /quit             ends the chat, as the end of the input does
For a line of text that begins with one slash, type two."""


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
    """Read lines from standard input and print the continuation of each.

    Ctrl-C ends the text that is being generated, or else the chat.

    Args:
      trained: the model.
      key: PRNG key.
      prompt: the text to continue before the first line, unless it is empty.
      length: the maximum number of tokens after each line; a command changes it.
      controls: how tokens are drawn; commands change them.
      stop_token: see `generation.stream_texts`.
      stop_at: see `generation.stream_texts`.
    """
    stops = make_stop_table(trained.vocabulary, stop_token, stop_at)
    arrays = generation.prepare_params(trained.model, trained.params)
    state = generation.initial_state(trained.model)
    earlier: list[State] = []  # For /undo.

    def answer(line: str, turn: int) -> State:
        """Read a line and print the continuation; return the state after it."""
        last = _read_line(trained, arrays, state, line)
        decode, show = text_decoder(trained.vocabulary, stop_token), make_printer()
        chunks = generate_chunks(
            trained.model,
            arrays,
            last,
            jax.random.fold_in(key, turn),  # After /undo, the same line has another answer.
            make_control_arrays(controls, len(trained.vocabulary)),
            stops,
            length,
        )
        try:
            for ids, after in chunks:
                print(show(decode(ids[0], False), False), end="", flush=True)
                last = after
        except KeyboardInterrupt:
            interrupts.answer()  # Keep the text generated so far.
        print(show(decode((), True), True), flush=True)
        return last

    if prompt:
        print(make_printable(prompt), end="", flush=True)
        earlier, state = [state], answer(prompt, turn=0)
    for turn, line in enumerate(_read_lines(), start=1):
        name, _, value = line[1:].strip().partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            earlier.append(state)
            state = answer(line.removeprefix("/"), turn)
        elif name == "quit":
            return
        elif name == "help":
            print(HELP, flush=True)
        elif name == "next":
            print(_format_next_tokens(trained, arrays, state), flush=True)
        elif name == "reset":
            state, earlier = generation.initial_state(trained.model), []
        elif name == "undo" and earlier:
            state = earlier.pop()
        elif name == "undo":
            _print_error("there is nothing to undo")
        elif name in _SETTINGS:
            try:
                length, controls = _change(length, controls, name, value)
            except UserError as error:
                _print_error(str(error))
        else:
            _print_error(f"there is no command /{name}: /help lists all")


def _read_lines() -> Iterator[str]:
    """Yield the lines of standard input, with a prompt on a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _read_line(trained: Trained, arrays: StepArrays | Params, state: State, line: str) -> State:
    """Return the state after a line; an empty first line is read as `encode_prompt` does."""
    if unknown := trained.vocabulary.unknown(line):
        _print_error(f"the model does not know {', '.join(map(repr, unknown))} and reads [UNK]")
    if state.position and not line:
        return state
    ids = generation.encode_prompt(trained.vocabulary, line)
    return generation.read_tokens(trained.model, arrays, state, ids[None])


def _format_next_tokens(trained: Trained, arrays: StepArrays | Params, state: State) -> str:
    """Return the five most likely next tokens, one a line, with the model's own probabilities."""
    probabilities = np.asarray(jax.nn.softmax(_read_line(trained, arrays, state, "").logits[0]))
    ids = np.argsort(-probabilities, kind="stable")[:5]
    return "\n".join(f"{probabilities[i]:.4f}  {trained.vocabulary.tokens[i]!r}" for i in ids)


def _change(length: int, controls: Controls, name: str, value: str) -> tuple[int, Controls]:
    """Return length and controls with one of them changed; raise `UserError` for a bad value."""
    try:
        number: Any = _SETTINGS[name](value)
    except ValueError:
        kind = "a whole number" if _SETTINGS[name] is int else "a number"
        raise UserError(f"/{name} takes {kind}, not {value!r}") from None
    if name != "length":
        controls = controls._replace(**{name: number})
        make_control_arrays(controls._replace(forbidden=()), vocabulary_size=3)
        return length, controls
    if number < 1:
        raise UserError(f"length is {number}: it must be 1 or more")
    return number, controls
