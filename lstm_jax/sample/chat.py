"""Chat with a model, line by line: `python -m lstm_jax.sample --interactive`."""

import itertools
import signal
import sys
from typing import Any

import jax
import numpy as np

from lstm_jax import generation
from lstm_jax.controls import Controls, check_number, make_control_arrays, make_stops
from lstm_jax.errors import UserError
from lstm_jax.generation import State
from lstm_jax.model import Prepared
from lstm_jax.run import interrupts
from lstm_jax.run.console import make_printable, make_printer
from lstm_jax.run.workdir import Trained

HELP = """\
The model reads each line and continues the whole text so far. After an empty line it continues
without new input. A line that begins with a slash is a command:
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

    The model continues a prompt before the first line. Commands change the controls and the length,
    which applies to each line. Ctrl-C ends the text that is being generated, or else the chat. For
    the arguments see `generation.stream_texts`.
    """
    model, vocabulary = trained.model, trained.vocabulary
    stops = make_stops(vocabulary, stop_token, stop_at)
    arrays = generation.prepare_params(model, trained.params)
    state = generation.initial_state(model, arrays)
    earlier: list[State] = []  # For /undo.
    settings: dict[str, Any] = {"length": length, **controls._asdict()}

    def answer(line: str, turn: int) -> State:
        """Read a line and print the continuation; return the state after it."""
        last = _read_line(trained, arrays, state, line)
        decode, show = generation.text_decoder(vocabulary, stop_token), make_printer()
        turn_key = jax.random.fold_in(key, turn)  # After /undo, a line gets another answer.
        chosen = Controls(**{name: settings[name] for name in Controls._fields})
        arrays_of_controls = make_control_arrays(chosen, len(vocabulary))
        stopped: list[int] = []
        with interrupts.handle_signals(lambda number, _: stopped.append(number), signal.SIGINT):
            for ids, after in generation.generate_chunks(
                model, arrays, last, turn_key, arrays_of_controls, stops, settings["length"]
            ):
                print(show(decode(ids[0], False), False), end="", flush=True)
                last = after
                if stopped:
                    break
        print(show(decode((), True), True), flush=True)
        return last

    if prompt:
        print(make_printable(prompt), end="", flush=True)
        earlier, state = [state], answer(prompt, turn=0)
    for turn in itertools.count(1):
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        name, _, value = line[1:].strip().partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            earlier.append(state)
            state = answer(line.removeprefix("/"), turn)
        elif name == "quit":
            return
        elif name == "help":
            print(HELP, flush=True)
        elif name == "next":
            logits = _read_line(trained, arrays, state, "").logits[0]
            probabilities = np.asarray(jax.nn.softmax(logits))
            for i in np.argsort(-probabilities, kind="stable")[:5]:
                print(f"{probabilities[i]:.4f}  {vocabulary.tokens[i]!r}", flush=True)
        elif name == "reset":
            state, earlier = generation.initial_state(model, arrays), []
        elif name == "undo" and earlier:
            state = earlier.pop()
        elif name == "undo":
            _print_error("there is nothing to undo")
        elif name in settings and name != "forbidden":
            try:
                settings[name] = _parse_number(name, type(settings[name]), value)
            except UserError as error:
                _print_error(str(error))
        else:
            _print_error(f"there is no command /{name}: /help lists all")


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _read_line(trained: Trained, arrays: Prepared, state: State, line: str) -> State:
    """Return the state after a line, of which the first is read as a prompt."""
    if named := trained.vocabulary.name_unknown(line):
        _print_error(f"the model does not know {named} and reads [UNK]")
    if state.position and not line:
        return state
    encode = trained.vocabulary.encode
    ids = encode(line) if state.position else generation.encode_prompt(trained.vocabulary, line)
    return generation.read_tokens(trained.model, arrays, state, ids[None])


def _parse_number(name: str, kind: type[int | float], value: str) -> int | float:
    """Return the new value of a setting, or raise `UserError`."""
    try:
        number = kind(value)
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise UserError(f"/{name} takes {words}, not {value!r}") from None
    check_number(name, number)
    return number
