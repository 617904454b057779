"""What every command shares: flags parsed, mistakes told in one line, interruption answered."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging

import lstm_jax
from lstm_jax import compiled, config
from lstm_jax.errors import UserError, one_line

INTERRUPTED = 130  # What a shell reports for a command that Ctrl-C ended.


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main`, and exits with what it returns (None is 0).

    A mistake of the user's (`UserError`, a bad flag, a broken config file) becomes one line on
    standard error and exit code 2; Ctrl-C becomes exit code 130.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            _fail(f"stray argument {argv[1]!r}: every argument is a flag, see --help")
        compiled.use_cache()
        logging.set_verbosity(logging.FATAL)  # app.run raises it once flags are parsed.
        try:
            return main()
        except UserError as error:
            _fail(str(error))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _fail(
                f"this needs more memory than there is ({one_line(error)[:200]}): lower the sizes "
                "of the model, or batches.batch_size"
            )
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # The reader (`| head`) has had enough; without this Python complains at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except PermissionError as error:  # Whether a path exists, too, may be forbidden to ask.
            _fail(f"can't read or write {error.filename}: {error.strerror}")

    app.run(guarded, flags_parser=_parse_flags)


def own_experiment(argument: str) -> str:
    """A flag's name and value, or its value, that names an experiment which comes with the package.

    What is no file here, but one of the package's own as it was installed, is named by its path
    there, so that `--config experiments/quick.py` is the same command in a clone and anywhere else.
    """
    flag, equals, value = argument.rpartition("=")
    name, colon, word = value.partition(":")
    own = Path(__file__).parent / name
    if not name.startswith("experiments/") or Path(name).exists() or not own.is_file():
        return argument
    return f"{flag}{equals}{own}{colon}{word}"


def _parse_flags(argv: Sequence[str]) -> list[str]:
    if {"--help", "-help", "-h", "-?"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    if {"--version", "-version"} & set(argv):
        print(f"lstm-jax {lstm_jax.__version__}")
        sys.exit(0)
    # Orbax, Grain and TFDS log much that no user of a command asked for; where one of them fails,
    # its exception is told.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _report_unraisable
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            _fail(f"the argument {argument!r} is not UTF-8")
    of_file = "--?(config|space)"  # The flags that experiments are named by.
    argv = [
        own_experiment(argument)
        if re.match(f"{of_file}=", argument) or re.fullmatch(of_file, before)
        else argument
        for before, argument in zip(["", *argv], argv, strict=False)
    ]
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # A config file is Python code: it can raise anything.
        _fail(_describe(error, argv))


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Reports all but what Orbax's threads raise after one of them has failed, which is told."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _describe(error: Exception, argv: Sequence[str]) -> str:
    """One line for an exception that parsing `argv` raised."""
    for argument in argv:
        field = re.match(r"--?config\.([\w.]+)", argument)
        if field and (message := config.unknown_field(field[1])):
            return message
    if isinstance(error, OSError):
        return f"can't read the config file: {str(error).rpartition(']')[2].strip()}"
    if isinstance(error, SyntaxError):
        return f"config file {error.filename}, line {error.lineno}: {error.msg}"
    if isinstance(error, flags.Error):
        # config_flags hands on a config file's own error as a printed traceback.
        _, in_config_file, trace = str(error).partition("Error whilst parsing config file:")
        return f"config file: {trace.splitlines()[-1]}" if in_config_file else str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if "ml_collections" in frame.filename:
        return f"config file: {one_line(error)}"
    return f"config file {frame.filename}, line {frame.lineno}: {one_line(error)}"


def _fail(message: str) -> NoReturn:
    # One line, whatever a name or a value in it holds.
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
