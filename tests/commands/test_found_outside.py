"""Test mistakes that users made when they tried the commands."""

import sys
import time
import unicodedata
from pathlib import Path

import pytest
from absl import flags

import lstm_jax
import models
from commands import run, run_python
from lstm_jax import __main__ as commands
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import transfer
from lstm_jax.run import command
from lstm_jax.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]


@pytest.mark.process
def test_the_package_lists_its_commands_quickly() -> None:
    started = time.monotonic()
    result = run_python("-m", "lstm_jax")
    assert time.monotonic() - started < 2
    assert result.returncode == 0 and result.stderr == ""
    package = ROOT / "lstm_jax"
    sources = [*package.glob("*.py"), *package.glob("*/__main__.py")]
    runnable = {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in sources
        if "\n    command.run_command(" in path.read_text(encoding="utf-8")
    }
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if "\n    command.run_command(" in text:  # Before the imports, which take seconds.
            assert "    interrupts.exit_at_once()" in text.partition("\nfrom absl")[0], path
    assert set(commands.COMMANDS) == runnable and len(runnable) == 6
    for name in runnable:
        assert f"python -m lstm_jax.{name} " in result.stdout


def test_the_version_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lstm-jax", "--version"])
    commands.main()
    assert capsys.readouterr().out == f"lstm-jax {lstm_jax.__version__}\n"


def test_a_field_without_its_section_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    for argument in ("--hidden_size=512", "--hidden_size"):
        with pytest.raises(SystemExit):
            command._parse_flags(["main", argument, "512"])
        error = "there is no flag --hidden_size: did you mean --config.model.hidden_size?"
        assert capsys.readouterr().err == f"error: {error}\n"


def list_imports(code: str) -> set[str]:
    """Return the packages that a process with this code has imported when it ends."""
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {code}"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.process
@pytest.mark.parametrize("module", commands.COMMANDS)
def test_help_imports_no_jax(module: str) -> None:
    run = f"import runpy; runpy.run_module('lstm_jax.{module}', run_name='__main__')"
    heavy = "flax grain jax matplotlib optax optuna orbax tensorboardX torch"
    assert not set(heavy.split()) & list_imports(f"sys.argv[1:] = ['--help']; {run}")


@pytest.mark.process
def test_training_imports_no_library_before_it_uses_it() -> None:
    late = {"matplotlib", "tensorflow_datasets", "tokenizers", "torch"}
    assert not late & list_imports("import lstm_jax.training")


def test_no_control_character_reaches_the_terminal(tmp_path: Path) -> None:
    config = config_lib.default()
    config.data.units = "bytes"
    config.model.embedding_size, config.model.hidden_size = 4, 6
    vocabulary = Vocabulary.from_text("", "bytes")
    model = model_lib.make_model(config.model, len(vocabulary))
    params = models.draw_params(model, 0.05)
    transfer.make_folder(tmp_path / "run", config, vocabulary, params)
    # An untrained model generates all bytes.
    options = [f"--workdir={tmp_path / 'run'}", "--temperature=1", "--num_samples=2"]
    result = run("sample", *options, "--prompt=\x1b[31m\r\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\x1b[31m\n"), "Python reads \\r\\n as a line break"
    assert not [c for c in result.stdout if unicodedata.category(c) == "Cc" and c not in "\n\t"]
