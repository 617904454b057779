"""List the commands, or run one: `python -m lstm_jax`, `lstm-jax sample --workdir DIR`."""

import runpy
import sys

from lstm_jax.errors import make_command
from lstm_jax.version import __version__

# Their names and purposes are written here, because importing the commands takes seconds.
COMMANDS = {
    "main": "train a model",
    "evaluate": "measure a trained model on a text",
    "sample": "generate text with a trained model",
    "convert": "read and write weights of PyTorch, or make the folder of a model",
    "export": "make a web page that shows what a model has learned, and generates text",
    "sweep": "search for good settings, or train several seeds",
}


def main() -> None:
    """List the commands, or run the one that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    module = "main" if name == "train" else name
    if module in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"lstm_jax.{module}", run_name="__main__", alter_sys=True)
        return
    if name == "--version":
        print(f"lstm-jax {__version__}")
        return
    if name not in ("--help", "-h", "-?"):
        print(f"error: there is no command {name!r}: use {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    for name, purpose in COMMANDS.items():
        print(make_command(name) + " " * (10 - len(name)) + purpose)
    print("\nEach explains its flags with --help. lstm-jax sample, ... do the same.")


if __name__ == "__main__":
    main()
