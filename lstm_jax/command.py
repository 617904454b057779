"""What every command shares: flags parsed, mistakes told in one line, interruption answered."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

import lstm_jax
from lstm_jax import config
from lstm_jax.devices import compilation_cache
from lstm_jax.errors import UserError, one_line, visible
from lstm_jax.run import interrupts


def run_command(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main`, and exits with what it returns (None is 0).

    A mistake of the user's (`UserError`, a bad flag, a broken config file) becomes one line on
    standard error and exit code 2; Ctrl-C becomes exit code 130.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            _fail(f"stray argument {argv[1]!r}: every argument is a flag, see --help")
        compilation_cache.use_cache()
        logging.set_verbosity(logging.FATAL)  # app.run raises it once flags are parsed.
        interrupted = False
        try:
            try:
                interrupts.raise_from_here()
                code = main()
                sys.stdout.flush()
            finally:
                interrupted = interrupts.end()
        except BaseException as error:
            # An interruption that was lost on its way can come out as any other exception.
            if interrupted or isinstance(error, KeyboardInterrupt):
                interrupts.leave()
            if not isinstance(error, Exception):
                raise
            code = _answer(error)
        if interrupted:
            interrupts.leave()
        return code

    _check_standard_streams()
    app.run(guarded, flags_parser=_parse_flags)


def _answer(error: Exception) -> int:
    """Exits with one line for a mistake of the user's; raises again what is none."""
    if isinstance(error, UserError):
        _fail(str(error))
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, MemoryError) or (is_of_jax and "RESOURCE_EXHAUSTED" in str(error)):
        _fail(
            f"this needs more memory than there is ({one_line(error)[:200]}): lower the sizes "
            "of the model, or batches.batch_size"
        )
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has had enough.
        _discard_output()
        return 0
    if isinstance(error, OSError):
        _fail(f"can't read or write {error.filename or 'a file'}: {error.strerror or error}")
    raise error


class _OutputError(UserError):
    """Standard output can't be written."""


class _Output:
    """Standard output, whose errors are not to be taken for those of a run's own files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._answered():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with self._answered():
            self._stream.flush()

    @contextlib.contextmanager
    def _answered(self) -> Any:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard_output()
            raise _OutputError(f"can't write to standard output: {error.strerror}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard_output() -> None:
    """Lets what is still to be written go nowhere; Python would complain at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _check_standard_streams() -> None:
    """Makes the three streams ones that can be written whatever text comes."""
    for number in range(3):  # A closed one would be the next file that is opened.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
    if sys.stdout is None:
        _fail("standard output is closed: send it to a file, or to /dev/null")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = _Output(sys.stdout)


def define_text_flags() -> None:
    """Defines the flags by which a user names the text that a run was trained on."""
    flags.DEFINE_string("data_path", None, "Where the run's own text is now, if it was moved.")
    flags.DEFINE_string(
        "dataset",
        None,
        "The TFDS dataset that the run was trained on: naming it lets the dataset's code run.",
    )
    flags.DEFINE_string(
        "data_directory", None, "Where TFDS keeps that dataset. [default: ~/tensorflow_datasets]"
    )


def find_own_experiment(argument: str) -> str:
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
        if "config" in flags.FLAGS:
            print("Fields of the config, each of which can be set (--config.seed=1):")
            for field, value in config.flatten(config.default()):
                print(f"  --config.{field}={value!r}")
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
        find_own_experiment(argument)
        if re.match(f"{of_file}=", argument) or re.fullmatch(of_file, before)
        else argument
        for before, argument in zip(["", *argv], argv, strict=False)
    ]
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # A config file is Python code: it can raise anything.
        _fail(_describe(error, argv))


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Reports all but what is told elsewhere.

    That is what Orbax's threads raise after one of them has failed, and an interruption, which
    `interrupts` raises again.
    """
    told = str(unraisable.exc_value) == "Event loop is closed"
    if not told and not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _describe(error: Exception, argv: Sequence[str]) -> str:
    """One line for an exception that parsing `argv` raised."""
    for argument in argv:
        field = re.match(r"--?config\.([\w.]+)", argument)
        if field and (message := config.describe_unknown_field(field[1])):
            return message
    if isinstance(error, OSError):
        return f"can't read the config file: {str(error).rpartition(']')[2].strip()}"
    if isinstance(error, SyntaxError):
        return f"config file {error.filename}, line {error.lineno}: {error.msg}"
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
        return "name an experiment, of which a field is set: --config experiments/quick.py"
    if isinstance(error, flags.Error):
        # config_flags hands on a config file's own error as a printed traceback.
        _, in_config_file, trace = str(error).partition("Error whilst parsing config file:")
        message = f"config file: {trace.splitlines()[-1]}" if in_config_file else str(error)
        return message.replace("invalid literal for int() with base 10: ", "no whole number: ")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if "ml_collections" in frame.filename:
        return f"config file: {one_line(error)}"
    return f"config file {frame.filename}, line {frame.lineno}: {one_line(error)}"


def _fail(message: str) -> NoReturn:
    # One line, whatever a name or a value in it holds.
    with contextlib.suppress(OSError):
        print("error:", visible(message), file=sys.stderr)
    sys.exit(2)
