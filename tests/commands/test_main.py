"""Test the output and exit codes of the commands."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lstm_jax
import models
import runs
from commands import get_output, keep_process_state, run, run_python
from lstm_jax import config, dynamic, errors, generation, training
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import transfer
from lstm_jax.generation import Controls
from lstm_jax.run import command, interrupts, workdir
from lstm_jax.vocabulary import FILE_END, Vocabulary

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "experiments" / "quick.py")
COMMANDS = ("main", "evaluate", "sample", "convert", "export", "sweep")


GOOD = "--config.data.path=good.txt"
TINY = ["--config", QUICK, *runs.TINY]


def test_sample_and_evaluate_need_only_the_directory(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained, tmp_path / "elsewhere")
    options = ["--workdir", str(moved), "--prompt", "ROMEO:", "--length", "50", "--seed", "3"]
    sample = run("sample", *options, cwd=tmp_path)
    assert sample.returncode == 0 and sample.stderr == ""
    assert sample.stdout.startswith("ROMEO:") and len(sample.stdout) == 6 + 50 + 1
    assert run("sample", *options, cwd=tmp_path).stdout == sample.stdout
    evaluation = run("evaluate", "--workdir", str(moved), "--split", "validation", cwd=tmp_path)
    result = json.loads(evaluation.stdout.splitlines()[-1])
    bits = ("bits_per_token", "bits_per_character")
    assert list(result) == ["split", "loss", *bits, "perplexity", "tokens", "step"]
    assert result["bits_per_character"] == pytest.approx(result["bits_per_token"])
    assert (result["split"], result["tokens"]) == ("validation", 999)
    rows = workdir.read_metrics(moved)
    recorded = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    assert result["loss"] == pytest.approx(recorded[result["step"]], abs=1e-6)


@pytest.mark.slow
def test_a_model_is_trained_further_on_another_text(
    trained: Path, text_file: Path, tmp_path: Path
) -> None:
    text = text_file.read_text(encoding="utf-8").replace("q", "é")[::-1]
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    command = ["main", f"--init_from={trained}", "--config.data.path=my.txt"]
    sizes = ["--config.batches.batch_size=8", "--config.max_steps=4", "--config.sample.length=20"]
    output = get_output(*command, *sizes, cwd=tmp_path)
    assert f"in {trained}; 1 new tokens: 'é'" in output
    directory = tmp_path / "runs" / f"finetune_{trained.name}"
    new, source = workdir.load_config(directory), workdir.load_config(trained)
    assert new.model == source.model and new.init_from == str(trained)
    assert new.optimizer.learning_rate < source.optimizer.learning_rate
    command[1] += "/"  # As a shell completes it.
    assert "is finished, at step 4" in get_output(*command, *sizes, cwd=tmp_path)


def test_a_flag_names_a_text_that_moved(trained: Path, text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_bytes()
    contents = (text, text[:-200], text[-200:-100], text[-100:])
    for name, content in zip(["whole", "a", "b", "c"], contents, strict=True):
        (tmp_path / name).write_bytes(content)
    command = "evaluate", f"--workdir={trained}", "--data_path"
    assert json.loads(get_output(*command, "whole", cwd=tmp_path))["split"] == "test"
    result = run(*command, "a;b;c", cwd=tmp_path)  # The same text, divided in another way.
    assert result.returncode == 2 and "or is split differently" in result.stderr


def test_several_samples_are_separated_by_dashes(trained: Path) -> None:
    flags = f"--workdir={trained}", "--num_samples=3", "--length=30", "--prompt=日本"
    result = run("sample", *flags, cwd=ROOT)
    texts = result.stdout.removesuffix("\n").split(f"\n{'-' * 20}\n")
    assert len(set(texts)) == 3 and all(text.startswith("日本") for text in texts)
    assert {len(text) for text in texts} == {2 + 30}
    assert result.stderr.splitlines() == [
        "warning: the model does not know '日', '本' and reads [UNK] instead"
    ]


def test_sample_passes_its_flags_and_prints_each_piece(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {}
    printed = []

    def stream(*unused: Any, **options: Any) -> Iterator[list[str]]:
        arguments.update(options)
        for piece in ("ab", "cd"):
            yield [piece]
            stdout: Any = sys.stdout.buffer
            printed.append(stdout.getvalue().decode())

    monkeypatch.setattr(generation, "stream_texts", stream)
    flags = "--prompt=O --temperature=0.7 --top_k=9 --top_p=0.9 --min_p=0.05 --length=7 --nostop"
    result = run("sample", f"--workdir={trained}", *flags.split())
    assert result.returncode == 0 and printed == ["Oab", "Oabcd"]
    assert arguments["controls"] == Controls(0.7, 9, 0.9, 0.05)
    assert (arguments["length"], arguments["stop_token"]) == (7, False)


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_little_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with keep_process_state(), pytest.raises(SystemExit):
        command.call_main(fail)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is not enough memory")


def test_any_text_is_measured_like_a_split(trained: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_bytes(text_file.read_bytes()[18_000:19_000])

    def measure(*flags: str) -> dict[str, Any]:
        output = get_output("evaluate", f"--workdir={trained}", *flags, cwd=tmp_path)
        fields: dict[str, Any] = json.loads(output)
        return fields

    (tmp_path / "last.txt").write_bytes(text_file.read_bytes()[18_000:])
    for name, path in (("validation", "validation.txt"), ("validation+test", "last.txt")):
        split, text = measure(f"--split={name}"), measure(f"--text={path}")
        assert text.pop("text") == path and text.pop("unknown_tokens") == 0
        assert split.pop("split") == name and text == split
    unknown = run("evaluate", f"--workdir={trained}", "--text=-", stdin="To \x1b\x7f日!\n")
    assert json.loads(unknown.stdout)["unknown_tokens"] == 3
    loaded = lstm_jax.load(trained)
    ids = loaded.vocabulary.encode(text_file.read_text())
    # The gradients are measured on the training text.
    members, settings = [(loaded.model, loaded.params)], dynamic.Settings(1e-3, 0.003, 50)
    losses = dynamic.adapt_to_text(members, ids[:18_000], ids[18_000:], settings)
    expected = losses.mean(dtype=np.float64)
    for flag in ("--split=validation+test", "--text=last.txt"):
        assert measure("--dynamic", flag)["loss"] == pytest.approx(expected, rel=1e-6)
    diverges = "--dynamic", "--dynamic_learning_rate=1e38"
    (line,) = run("evaluate", f"--workdir={trained}", *diverges, cwd=tmp_path).stderr.splitlines()
    assert line.startswith("error: the loss is not a number")

    # The mean over windows, in which the first tokens are harder to predict.
    windows = measure("--split=validation+test", "--context=32")
    losses = loss_lib.compute_token_losses(loaded.model, loaded.params, ids[18_000:], 32)
    assert windows["context"] == 32 and windows["loss"] > split["loss"]
    assert windows["loss"] == pytest.approx(losses.mean(dtype=np.float64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input is too short: it has 0 characters"),
        (b"a", "standard input is too short: it has 1 characters"),
        (b"caf\xe9", "is not UTF-8 at byte 3"),
    ],
)
def test_a_text_that_cannot_be_measured_gives_one_line(
    content: bytes, message: str, trained: Path
) -> None:
    result = run("evaluate", f"--workdir={trained}", "--text=-", stdin=content)
    assert result.returncode == 2 and not result.stdout
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("module", COMMANDS)
def test_help_fits_on_two_screens(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(module, "--help", cwd=ROOT)
    assert result.returncode == 0 and result.stderr == ""
    assert f"python -m lstm_jax.{module} " in result.stdout and "--workdir" in result.stdout
    assert len(result.stdout.splitlines()) <= 48
    has_fields = module in ("main", "sweep")
    assert ("`python -m lstm_jax.config` lists them" in result.stdout) == has_fields
    takes_text = module in ("evaluate", "export")
    assert ("--data_path: " in result.stdout) == takes_text, "flags that commands share"


def test_the_full_help_explains_each_field() -> None:
    text = " ".join(run("main", "--helpfull").stdout.split())
    for field in config.FIELDS.values():
        assert (f"config.{field.name}: {field.meaning}" in text) == field.is_flag


def test_a_printed_command_starts_the_same_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    (tmp_path / "bin").mkdir()
    for place, python in ((".", ".venv/bin/python"), ("bin", f"{tmp_path}/.venv/bin/python")):
        monkeypatch.chdir(tmp_path / place)
        command = errors.make_command("sample", "--workdir", "my run")
        assert command == f"{python} -m lstm_jax.sample --workdir 'my run'"


@pytest.mark.process
@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_no_jax(module: str) -> None:
    result = run_python("-X", "importtime", "-m", f"lstm_jax.{module}", "--help")
    assert result.returncode == 0 and "| absl.flags\n" in result.stderr.replace("  ", "")
    assert not re.search(r"\| +(flax|jax|optax|optuna|orbax|torch)\n", result.stderr)


@pytest.mark.process
def test_a_model_in_the_package_needs_no_library_of_training() -> None:
    flags = "--model=tiny-shakespeare", "--length=1"
    result = run_python("-X", "importtime", "-m", "lstm_jax.sample", *flags)
    assert result.returncode == 0 and re.search(r"\| +jax\n", result.stderr)
    assert not re.search(r"\| +(orbax|tensorboardX|tensorflow_datasets)\b", result.stderr)


def test_flags_set_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(training, "train", lambda *arguments: calls.append(arguments))
    flags = "--config.num_epochs=1_0 --config.data.fractions=0.8,0.1,0.1"
    flags += " --config.model.options.rounds 3 --config.optimizer.learning_rate=1"
    result = run("main", *flags.split(), f"--config={ROOT}/experiments/cells.py:gru")
    assert result.returncode == 0 and result.stderr == ""
    ((fields, directory),) = calls
    assert directory == Path("runs/cells_gru") and fields.model.cell == "gru"
    assert (fields.num_epochs, fields.data.fractions) == (10, (0.8, 0.1, 0.1))
    assert fields.model.options == {"rounds": 3}
    assert fields.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main"], "specify an experiment: --config experiments/quick.py"),
        (["main", "--init_from=.", "--config.data.path=good.txt"], "no trained model in '.'"),
        (["main", f"--config={ROOT}/experiments/cells.py:foo"], "choose from lstm, gru, rnn"),
        (["main", "--config", QUICK, "--config.num_epochs=three"], "num_epochs is 'three'"),
        (["main", "--hidden_size=3"], "no flag --hidden_size: did you mean --config.model.hidden"),
        (["main", "--config", QUICK, "--wordir=x"], "Did you mean: workdir"),
        (["main", "--config", QUICK, "stray"], "stray argument 'stray'"),
        (["main", *TINY, GOOD, "--config.model.options.x=1"], "has no option x"),
        (["main", *TINY, GOOD, "--config.model.options.x=[1]"], "options is {'x': [1]}: it needs"),
        (["main", "--config", QUICK, "--config.data.path=short.txt"], "too short"),
        (["main", *TINY, GOOD, "--workdir=zero.txt/run"], "can't write"),
        (["evaluate", "--workdir=.", "--dynamic", "--context=9"], "use only one of them"),
        (["evaluate", "--workdir=.", "--dynamic_segment_length=0"], "segment_length=0"),
        (["evaluate", "--workdir=.", "--dynamic_decay=0.01"], "add --dynamic"),
        (["evaluate", "--workdir=.", "--text=-", "--split=test"], "--text and --split"),
        (["evaluate", "--workdir=.", "--split=nothing"], "train|validation|test"),
        (["sweep", "--config", QUICK, "--seeds=2", "--space=a.py"], "use either --space"),
        (["sample"], "specify the trained model: --workdir DIR"),
        (["sample", "--workdir=.", "--temperature=-0.5"], "temperature is -0.5"),
        (["convert", "--workdir=x", "--from=good.txt"], "either --from FILE and --vocabulary FILE"),
    ],
    ids=lambda value: " ".join(value).replace(QUICK, "quick") if isinstance(value, list) else "",
)
def test_a_mistake_gives_a_one_line_error_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, text_file: Path
) -> None:
    (tmp_path / "zero.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_text("To be or not to be, that is the question. " * 10)
    (tmp_path / "good.txt").write_bytes(text_file.read_bytes())
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= {"zero.txt", "short.txt", "good.txt", "text.txt", ".lock"}


def test_a_text_of_documents_that_are_files_ends_with_their_stop_token(tmp_path: Path) -> None:
    fields = config.default()
    fields.data.document_separator, fields.model.embedding_size = "file", 4
    fields.model.hidden_size = 6
    vocabulary = Vocabulary.from_text(f"ab{FILE_END}", stop=FILE_END)
    model = model_lib.make_model(fields.model, len(vocabulary), vocabulary.stop_id)
    params = models.draw_params(model, 0.1)
    transfer.make_folder(tmp_path / "run", fields, vocabulary, params)
    flags = ["evaluate", f"--workdir={tmp_path / 'run'}", "--text=-"]
    assert json.loads(get_output(*flags, stdin="abba"))["tokens"] == 4


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_ends_the_process_at_once(number: signal.Signals) -> None:
    code = (
        "import os; from lstm_jax.run import command\n"
        f"command.run_command(lambda: os.kill(os.getpid(), {number.value}))"
    )
    process = run_python("-c", code)
    assert (process.returncode, process.stderr) == (-number, "")


def test_a_second_signal_is_handled_as_before_and_an_ignored_one_stays_ignored() -> None:
    numbers: list[int] = []
    before = [
        signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number)),
        signal.signal(signal.SIGINT, signal.SIG_IGN),
    ]
    try:
        with interrupts.StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.code
            signal.raise_signal(signal.SIGTERM)
            assert (stop.code, numbers) == (143, [])
            signal.raise_signal(signal.SIGTERM)
        assert numbers == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
