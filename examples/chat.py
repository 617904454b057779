"""Chat with a model, line by line.

    python examples/chat.py tiny-shakespeare --length 100 --temperature 0.7

Each line is appended to the text so far, and the model continues it; an empty line appends nothing.
/next shows the five most likely next tokens, /undo removes the last line and its answer, and /reset
removes all. Ctrl-C ends an answer or, at the start of a line, the chat.
"""

import argparse
import itertools
import sys
from typing import Any

import lstm_jax
from lstm_jax.run import command
from lstm_jax.run.messages import make_printable


def chat(run: lstm_jax.Run, **options: Any) -> None:
    """Read lines from standard input and print the continuation of each; see `Run.stream`."""
    text, earlier = "", list[str]()
    run.stream(**options)  # It checks the options.
    for turn in itertools.count():
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/next":
            for token, probability in run.next(text, n=5):
                print(f"{probability:.4f}  {token!r}")
        elif line == "/reset":
            text, earlier = "", []
        elif line == "/undo":
            text = earlier.pop() if earlier else ""
        else:
            earlier.append(text)
            text += line
            try:
                for piece in run.stream(text, seed=turn, **options):
                    print(make_printable(piece), end="", flush=True)
                    text += piece
                text += run.vocabulary.stop  # In a model of documents, an answer ends one.
            except KeyboardInterrupt:
                pass
            print()


def main() -> None:
    """Parse the command line, and chat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="+", help="working directory, or several as an ensemble")
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    options = vars(parser.parse_args())
    chat(lstm_jax.load(options.pop("model")), **options)


if __name__ == "__main__":
    command.call_main(main)
