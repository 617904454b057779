"""Run a command: parse its flags, and print a user's mistake as one line."""

import contextlib
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from lstm_jax import config, errors
from lstm_jax.errors import UserError, make_visible, one_line
from lstm_jax.run import console, interrupts
from lstm_jax.version import __version__

# What imports JAX is imported in functions: `--help` and a mistake in a flag don't need it.

# The meaning of --workdir where a model is read.
TRAINED = "Working directory of a training run, folder of a model, or name of one in the package"

# Flags that functions of this module define belong to the command that calls them.
flags.disclaim_key_flags()


def run_command(main: Callable[[], int | None]) -> None:
    """Parse the flags, call `main`, and exit with the code that it returns (None means 0).

    A user's mistake (`UserError`, a bad flag, a config file that fails) is printed as one line on
    standard error, with exit code 2. For signals, see `interrupts`.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"stray argument {argv[1]!r}: every argument is a flag, see --help")
        from tqdm import tqdm

        from lstm_jax.devices import compilation_cache

        compilation_cache.use_cache()
        absl_logging.set_verbosity(absl_logging.FATAL)  # app.run increases it after parsing.
        devices = logging.getLogger("jax._src.xla_bridge")  # Such as a GPU that can't be used.
        devices.setLevel(logging.WARNING)
        devices.addFilter(_warn)
        # Its own lock is one of processes, which exits of this package would seem to leak.
        tqdm.set_lock(threading.RLock())
        try:
            code = main()
            sys.stdout.flush()
        except Exception as error:
            code = _report(error)
        if code:  # A signal stopped training, which has saved and reported this.
            interrupts.exit_now(code)

    def parse_flags(argv: Sequence[str]) -> list[str]:
        try:
            return _parse_flags(argv)
        except (UserError, OSError) as error:  # Of standard output, as in `--help | head`.
            sys.exit(_report(error))

    console.protect_streams()
    app.run(guarded, flags_parser=parse_flags)


def _warn(record: logging.LogRecord) -> bool:
    """Print a record as a warning on one line, and log nothing."""
    error = record.exc_info[1] if record.exc_info else None
    errors.warn(record.getMessage() + (f" ({one_line(error)})" if error else ""))
    return False


def _report(error: Exception) -> int:
    """Exit with one line for a user's mistake; re-raise any other error."""
    if isinstance(error, UserError):
        _fail(str(error))
    if isinstance(error, BrokenPipeError):  # The reader, for example `| head`, has closed the pipe.
        console.discard_output()
        return 0
    if isinstance(error, OSError):
        _fail(f"can't read or write {error.filename or 'a file'}: {error.strerror or error}")
    import jax

    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, MemoryError) or (is_of_jax and "RESOURCE_EXHAUSTED" in str(error)):
        remedy = "use a smaller model, or read or generate less at a time"
        if "config" in flags.FLAGS:
            remedy = "lower the sizes of the model, or batches.batch_size"
        _fail(f"there is not enough memory ({one_line(error)[:200]}): {remedy}")
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and isinstance(error, (RuntimeError, AssertionError)) and not _has_device():
        _fail(
            f"JAX finds no device of JAX_PLATFORMS={platforms}: set another one, or install JAX "
            "for it"
        )
    raise error


def _has_device() -> bool:
    import jax

    try:
        return bool(jax.local_devices())
    except (RuntimeError, AssertionError):
        return False


class _ConfigParser(flags.ArgumentParser[object]):
    """Loads a config file, FILE or FILE:WORD. The parser of config_flags hides errors in it."""

    def parse(self, argument: str) -> object:
        """Return the config that the argument names."""
        return config.load(argument)


def define_config_flag(meaning: str) -> None:
    """Define --config, and a flag for each field; `config.complete_config` checks their names."""
    config_flags.DEFINE_config_file(
        "config", None, meaning, lock_config=False, accept_new_attributes=True
    )
    flags.FLAGS["config"].parser = _ConfigParser()


def read_experiment() -> tuple[config.Config, str]:
    """Return the config that --config names, complete, and a name for its runs."""
    flag = flags.FLAGS["config"]
    if not flag.present:
        raise UserError("specify an experiment: --config experiments/quick.py")
    name, word = config.split_name(flag.config_filename)
    name = f"{Path(name).stem}_{Path(word).name}" if word else Path(name).stem
    return config.complete_config(flag.value), name


def define_run_flags() -> Callable[[], list[Path]]:
    """Define the flags that name a trained run; return a function that reads them.

    It loads --cell, and returns every --workdir (or --model, its alias); without one, it raises
    `UserError`.
    """
    workdir = flags.DEFINE_multi_string(
        "workdir", None, f"{TRAINED}; evaluate and sample accept several, as an ensemble."
    )
    flags.DEFINE_alias("model", "workdir")
    cell = flags.DEFINE_multi_string(
        "cell", [], "FILE.py:CLASS of the run's cell, if it has your own."
    )

    def read() -> list[Path]:
        if not workdir.value:
            raise UserError("specify the trained model: --workdir DIR")
        from lstm_jax.run import cell_file
        from lstm_jax.run.workdir import check_path

        for name in cell.value:
            cell_file.load_cell(name)
        return [*map(check_path, workdir.value)]

    return read


def define_text_flags() -> Callable[[], list[str | None]]:
    """Define the flags that name the text of a trained run; return a function that reads them.

    It returns the path and directory of `texts.load_texts_of_run`.
    """
    define = flags.DEFINE_string
    text_flags = (
        define("data_path", None, "The text that the run was trained on, if it was moved."),
        define("data_directory", None, "TFDS's data directory. [default: ~/tensorflow_datasets]"),
    )
    return lambda: [flag.value for flag in text_flags]


def define_dtype_flag(*more: str) -> flags.FlagHolder[str | None]:
    """Define the flag --dtype, for commands that run a trained model; `more` are other dtypes."""
    return flags.DEFINE_enum(
        "dtype",
        None,
        [*config.DTYPES, *more],
        "Dtype of matmul operands, instead of the run's; auto: the faster one to train with here.",
    )


def _get_value(argv: Sequence[str], name: str) -> str | None:
    """Return the value of a flag in the arguments of a command, or None."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            return value if equals else following
    return None


def _parse_flags(argv: Sequence[str]) -> list[str]:
    if {"--help", "-help", "-h", "-?"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        if "config" in flags.FLAGS:
            print("Fields of the config, with their defaults:\n")
            print(config.describe_fields(min(shutil.get_terminal_size().columns, 100)))
        sys.stdout.flush()
        sys.exit(0)
    if {"--version", "-version"} & set(argv):
        print(f"lstm-jax {__version__}")
        sys.exit(0)
    # Orbax, Grain and TFDS log a lot. If one of them fails, its exception is reported.
    absl_logging.set_verbosity(absl_logging.FATAL)
    for argument in argv:
        if re.search("[\ud800-\udfff]", argument):
            _fail(f"the argument {argument!r} is not UTF-8")
    model = _get_value(argv, "init_from")
    if model and "init_from" in flags.FLAGS and _get_value(argv, "config") is None:
        # The experiment of the package: the user has named none.
        finetune = config.find_in_package("experiments/finetune.py")
        argv = [argv[0], f"--config={finetune}:{model}", *argv[1:]]
    config_file = config.split_name(_get_value(argv, "config") or "")[0]
    try:  # An override of what a config file returns can raise anything.
        with errors.run_user_code("config file", config_file, flags.Error, SystemExit):
            left = flags.FLAGS(argv)
    except (UserError, flags.Error) as error:
        _fail(_describe(error, argv))
    for name in flags.FLAGS:  # An unset variable of a shell must not mean a default.
        flag = flags.FLAGS[name]
        given = flag.value if isinstance(flag.value, list) else [flag.value]
        if flag.default is None and "" in given and not name.startswith("config."):
            _fail(f"--{name} is empty: give it a value, or leave it out")
    return left


def _describe(error: Exception, argv: Sequence[str]) -> str:
    """Return one line about an exception that was raised by parsing `argv`."""
    for argument in argv:
        field = re.match(r"--?config\.([\w.]+)", argument)
        if field and (message := config.describe_unknown_field(field[1])):
            return message
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname == "cell":
        return (
            "this command has no --cell: main and sweep take --config.model.cell=FILE.py:CLASS, "
            "and convert supports only cells of the package"
        )
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
        return f"--{error.flagname} needs an experiment: add --config experiments/quick.py"
    if isinstance(error, flags.UnrecognizedFlagError) and "config" in flags.FLAGS:
        suffix = f".{error.flagname}"
        if fields := [f"--config.{f.name}" for f in config.FIELDS if f".{f.name}".endswith(suffix)]:
            return f"there is no flag --{error.flagname}: did you mean {' or '.join(fields)}?"
    message = re.sub(r"\('Non-boolean .*', (.*)\)", r"not true or false: \1", str(error))
    return message.replace("invalid literal for int() with base 10: ", "not an integer: ")


def _fail(message: str) -> NoReturn:
    # Names and values in the message may contain line breaks.
    with contextlib.suppress(OSError):
        print("error:", make_visible(message), file=sys.stderr)
    sys.exit(2)
