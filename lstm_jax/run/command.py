"""Run a command: parse its flags, and print a user's mistake as one line."""

import ast
import contextlib
import functools
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from lstm_jax import cells, config
from lstm_jax.errors import UserError, make_visible, one_line, show_log
from lstm_jax.run import interrupts

# What imports JAX is imported in functions: `--help` and a mistake in a flag don't need it.

# The meaning of --workdir where a model is read.
TRAINED = "Directory of a run, folder of a model, or name of one in the package"

# Flags that functions of this module define belong to the command that calls them.
flags.disclaim_key_flags()


def run_command(main: Callable[[], int | None]) -> None:
    """Parse the flags of absl, and call `main` with `call_main`; a bad flag is one line, too."""
    show_log()
    # Ctrl-C ends the process at once, like SIGTERM: Python would raise KeyboardInterrupt, maybe in
    # an import, which can't be repeated. Files get their names when they are complete.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A name of a file, or a sample, must not end a training if the terminal can't show it.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app.run(lambda unused: call_main(main), flags_parser=_parse_flags)


def call_main(main: Callable[[], int | None]) -> None:
    """Call `main`, and exit with the code that it returns (None means 0).

    A user's mistake (`UserError`, a config file that fails) is printed as one line on standard
    error, with exit code 2.
    """
    import jax

    from lstm_jax.devices import setup

    setup.use_cache()
    logging.getLogger("jax").setLevel(logging.WARNING)  # For a GPU that can't be used.
    # Coroutines of Orbax fail after a save has failed, which is reported.
    sys.unraisablehook = lambda unraisable: None
    try:
        code = main()
        sys.stdout.flush()
    except interrupts.Stopped as stopped:
        code = stopped.code
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"can't read or write {error.filename or 'a file'}: {error.strerror or error}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(
            f"there is not enough memory ({one_line(error)[:200]}): lower "
            "--config.batches.batch_size or the sizes of the model, or read or generate less at a "
            "time"
        )
    if code:  # Of a signal that stopped training, or of a sweep; the reason is printed.
        interrupts.exit_now(code)


def _fail(message: str) -> NoReturn:
    print("error:", make_visible(message), file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags with absl; exit with one line for a mistake."""
    try:
        arguments = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname.removeprefix("config.")
        if "config" in flags.FLAGS and name.startswith(f"{config.OPTIONS}."):
            _define_field(name, dict, "An option that the cell declares.")
            flags.FLAGS.unparse_flags()
            return _parse_flags(argv)
        fields = config.find_fields(name) if "config" in flags.FLAGS else []
        if not fields:
            _fail(str(error))  # It names similar flags.
        names = " or ".join(f"--config.{field}" for field in fields)
        _fail(f"there is no flag --{error.flagname}: did you mean {names}?")
    except (flags.Error, ValueError) as error:
        _fail(str(error))
    except SystemExit:  # absl has printed the help, and exits with code 1.
        sys.exit(0)
    if len(arguments) > 1:
        _fail(f"stray argument {arguments[1]!r}: every argument is a flag, see --help")
    if flags.FLAGS["verbosity"].using_default_value:
        # Orbax and TFDS log a lot. If one of them fails, its exception is reported.
        flags.FLAGS.verbosity = absl_logging.FATAL
    return arguments


def define_config_flag(meaning: str) -> None:
    """Define --config, and a flag for each field that a user may set."""
    flags.DEFINE_string("config", None, meaning)
    for field in config.FIELDS.values():
        if field.is_flag:
            _define_field(field.name, type(field.default), config.explain(field))


class _LiteralParser(flags.ArgumentParser[object]):
    """Parses a Python literal, such as a tuple; anything else is a string, also None."""

    def parse(self, argument: str) -> object:
        """Return the value; None would mean that the flag is not given."""
        with contextlib.suppress(SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            if (value := ast.literal_eval(argument)) is not None:
                return value
        return argument


def _define_field(name: str, kind: type, meaning: str) -> None:
    """Define the flag of a field with values of this type; it is None unless it is given."""
    literal = functools.partial(flags.DEFINE, _LiteralParser())
    define = {bool: flags.DEFINE_bool, str: flags.DEFINE_string}.get(kind, literal)
    # `--help` lists the flags of the command, and `--helpfull` also those of other modules.
    define(f"config.{name}", None, meaning, module_name=config.__name__)


def read_experiment(default: str | None = None) -> tuple[config.Config, str]:
    """Return the config that --config names, else the default one, and a name for its runs."""
    experiment = flags.FLAGS.config or default
    if not experiment:
        raise UserError("specify an experiment: --config experiments/quick.py")
    overrides = {
        name.removeprefix("config."): flags.FLAGS[name].value
        for name in flags.FLAGS
        if name.startswith("config.") and flags.FLAGS[name].value is not None
    }
    file, word = config.split_name(experiment)
    name = f"{Path(file).stem}_{Path(word).name}" if word else Path(file).stem
    return config.complete_config(config.load(experiment), overrides), name


def define_run_flags() -> Callable[[], list[Path]]:
    """Define the flags that name a trained run; return a function that reads them.

    It loads every --cell, and returns every --workdir (or --model, its alias). Without one, it
    raises `UserError`.
    """
    workdir = flags.DEFINE_multi_string("workdir", None, f"{TRAINED}; several are an ensemble.")
    flags.DEFINE_alias("model", "workdir")
    cell_names = flags.DEFINE_multi_string("cell", [], "FILE.py:CLASS of a cell of your own.")

    def read() -> list[Path]:
        if not workdir.value:
            raise UserError("specify the trained model: --workdir DIR")
        from lstm_jax.run.workdir import expand_path

        for name in cell_names.value:
            cells.load_cell(name)
        return [*map(expand_path, workdir.value)]

    return read


def define_text_flag() -> flags.FlagHolder[str | None]:
    """Define the flag --data_path, for commands that read the text of a trained run again."""
    meaning = "The text that the run was trained on, if it was moved."
    return flags.DEFINE_string("data_path", None, meaning)


def define_dtype_flag() -> flags.FlagHolder[str | None]:
    """Define the flag --dtype, for commands that run a trained model."""
    meaning = "Dtype of matmuls, instead of the run's; auto: the faster one here."
    return flags.DEFINE_enum("dtype", None, config.DTYPES, meaning)
