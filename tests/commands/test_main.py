"""Test the output and exit codes of the commands."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import models
import runs
from commands import run
from lstm_jax import config, dynamic, generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.controls import Controls
from lstm_jax.convert import transfer
from lstm_jax.run import command, console, metrics, workdir
from lstm_jax.vocabulary import FILE_END, Vocabulary

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "experiments" / "quick.py")


TINY = ["--config", QUICK, *runs.TINY]


def test_sample_and_evaluate_need_only_the_directory(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained, tmp_path / "elsewhere")
    options = ["--workdir", str(moved), "--prompt", "ROMEO:", "--length", "50", "--seed", "3"]
    sampled = run("sample", *options, cwd=tmp_path)
    assert sampled.returncode == 0 and sampled.stderr == ""
    assert sampled.stdout.startswith("ROMEO:") and len(sampled.stdout) == 6 + 50 + 1
    assert run("sample", *options, cwd=tmp_path).stdout == sampled.stdout
    evaluated = run("evaluate", "--workdir", str(moved), "--split", "validation", cwd=tmp_path)
    result = json.loads(evaluated.stdout.splitlines()[-1])
    bits = ("bits_per_token", "bits_per_character")
    assert list(result) == ["split", "loss", *bits, "perplexity", "tokens", "step"]
    assert result["bits_per_character"] == pytest.approx(result["bits_per_token"])
    assert (result["split"], result["tokens"]) == ("validation", 999)
    rows = metrics.read_metrics(moved / workdir.METRICS)
    recorded = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    assert result["loss"] == pytest.approx(recorded[result["step"]], abs=1e-6)


@pytest.mark.slow
def test_a_model_is_trained_further_on_another_text(
    trained: Path, text_file: Path, tmp_path: Path
) -> None:
    text = text_file.read_text(encoding="utf-8").replace("q", "é")[::-1]
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    (tmp_path / "experiments").mkdir()  # The user names no file there.
    (tmp_path / "experiments" / "finetune.py").write_text("raise ValueError")
    command = ["main", f"--init_from={trained}", "--config.data.path=my.txt"]
    sizes = ["--config.batches.batch_size=8", "--config.max_steps=4", "--config.sample.length=20"]
    first = run(*command, *sizes, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"in {trained}; the vocabulary has 1 new tokens: 'é'" in first.stdout
    directory = tmp_path / "runs" / f"finetune_{trained.name}"
    made, source = workdir.load_config(directory), workdir.load_config(trained)
    assert made.model == source.model and made.init_from == str(trained)
    assert made.optimizer.learning_rate < source.optimizer.learning_rate
    again = run(*command, *sizes, cwd=tmp_path)
    assert again.returncode == 0 and "is finished after 4 steps" in again.stdout


def test_a_cell_that_only_the_model_names_is_not_run(
    trained: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'seen')!r}, 'w')")
    before = workdir.load_config(trained)
    cell = {"model.cell": f"{evil}:Evil", "model.cell_sha256": "0" * 64}
    workdir.save_config(tmp_path / "run", config.change_fields(before, cell))
    done = run("main", "--init_from=run", f"--config.data.path={text_file}", cwd=tmp_path)
    assert done.returncode == 2 and f"add --config.model.cell={evil}:Evil" in done.stderr
    assert not (tmp_path / "seen").exists()


def test_a_flag_names_a_text_that_moved(trained: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "moved.txt"
    other.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    result = run("evaluate", "--workdir", str(trained), "--data_path", str(other), cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)["split"] == "test"
    parts = [tmp_path / name for name in "abc"]  # The same text, divided in another way.
    text = text_file.read_bytes()
    for part, content in zip(parts, (text[:-200], text[-200:-100], text[-100:]), strict=True):
        part.write_bytes(content)
    divided = ";".join(map(str, parts))
    result = run("evaluate", "--workdir", str(trained), "--data_path", divided, cwd=tmp_path)
    assert result.returncode == 2 and "or is split differently" in result.stderr
    other.write_text("another text, though long enough to be split in three" * 10)
    result = run("evaluate", "--workdir", str(trained), "--data_path", str(other), cwd=tmp_path)
    assert result.returncode == 2 and "not the one this run was trained on" in result.stderr


def test_the_error_for_a_missing_text_names_its_flag(trained: Path, tmp_path: Path) -> None:
    result = run("evaluate", f"--workdir={trained}", "--data_path=gone.txt", cwd=tmp_path)
    assert result.returncode == 2
    assert "no text file gone.txt: name an existing one (data.path, --data_path)" in result.stderr


def test_unknown_characters_in_a_prompt_give_a_warning(trained: Path) -> None:
    result = run("sample", "--workdir", str(trained), "--prompt", "日本", "--length=9", cwd=ROOT)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "warning: the model does not know '日', '本' in the prompt and reads [UNK] instead"
    ]
    assert result.stdout.startswith("日本") and len(result.stdout) == 2 + 9 + 1


def test_several_samples_are_separated_by_dashes(trained: Path) -> None:
    result = run("sample", "--workdir", str(trained), "--num_samples=3", "--length=30", cwd=ROOT)
    texts = result.stdout.removesuffix("\n").split(f"\n{'-' * 20}\n")
    assert len(set(texts)) == 3 and {len(text) for text in texts} == {30}


@pytest.mark.slow
def test_a_model_of_words_and_documents(tmp_path: Path, text_file: Path) -> None:
    documents = ["--config.data.document_separator=blank_line", "--config.num_epochs=1"]
    units = ["--config.data.units=words", "--config.data.min_count=2"]
    flags = [f"--config.data.path={text_file}", "--workdir=run", *documents, *units]
    result = run("main", *TINY, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nats per token" in result.stdout and "bits per character" in result.stdout
    words = tmp_path / "run"
    evaluated = json.loads(run("evaluate", "--workdir", words, cwd=ROOT).stdout)
    assert 0 < evaluated["bits_per_character"] < evaluated["bits_per_token"]
    # Both restart the carry at each document.
    (loss,) = [loss for _, split, loss in runs.read_losses(words) if split == evaluated["split"]]
    assert evaluated["loss"] == pytest.approx(loss, rel=1e-5)
    assert workdir.load_trained(words).model.stop_id is not None
    options = ["--workdir", words, "--prompt=First Citizen:", "--length=3000"]
    stopped = run("sample", *options, cwd=ROOT)
    on = run("sample", *options, "--nostop", cwd=ROOT)
    assert stopped.returncode == on.returncode == 0 and stopped.stderr == on.stderr == ""
    assert "[UNK]" not in on.stdout
    assert on.stdout.startswith(stopped.stdout.removesuffix("\n") + "\n\n")


def test_prompts_from_files_and_standard_input(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfROMEO:\r\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    options = ["sample", "--workdir", str(trained), "--length=20"]
    from_file = run(*options, "--prompt_file=prompt.txt", cwd=tmp_path)
    assert from_file.stdout.startswith("ROMEO:\n")
    from_stdin = run(*options, "--prompt_file=-", cwd=tmp_path, given="ROMEO:")
    assert from_stdin.stdout == run(*options, "--prompt=ROMEO:", cwd=tmp_path).stdout
    for name, message in {
        "missing.txt": "can't read missing.txt (--prompt_file): No such file",
        "latin.txt": "latin.txt (--prompt_file) is not UTF-8 at byte 3",
    }.items():
        result = run(*options, f"--prompt_file={name}", cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_controls_and_warnings(trained: Path) -> None:
    options = ["sample", "--workdir", str(trained), "--length=300"]
    controls = ["--top_k=20", "--top_p=0.9", "--min_p=0.01", "--repetition_penalty=1.1"]
    result = run(*options, *controls, "--forbid=eE日", cwd=ROOT)
    assert result.returncode == 0
    assert "e" not in result.stdout and len(result.stdout) > 300
    (unknown,) = result.stderr.splitlines()
    assert "does not know '日' in --forbid" in unknown
    ended = run(*options, "--stop_at=a", cwd=ROOT).stdout
    assert ended.index("a") == len(ended) - 2


def test_sample_passes_its_flags_and_prints_each_piece(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    printed = []

    def stream(*unused: Any, **options: Any) -> Iterator[list[str]]:
        given.update(options)
        for piece in ("ab", "cd"):
            yield [piece]
            stdout: Any = sys.stdout.buffer
            printed.append(stdout.getvalue().decode())

    monkeypatch.setattr(generation, "stream_texts", stream)
    flags = "--prompt=O --temperature=0.7 --top_k=9 --top_p=0.9 --min_p=0.05 --length=7 --nostop"
    flags += " --repetition_penalty=1.3 --repetition_window=10 --forbid=e --stop_at=x"
    done = run("sample", f"--workdir={trained}", *flags.split())
    assert done.returncode == 0 and printed == ["Oab", "Oabcd"]
    forbidden = workdir.load_vocabulary(trained).encode("e").tolist()
    assert given["controls"] == Controls(0.7, 9, 0.9, 0.05, 1.3, 10, forbidden)
    assert (given["length"], given["stop_token"], given["stop_at"]) == (7, False, "x")


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_little_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command._report(error)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is not enough memory")


def test_a_platform_without_a_device_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit):
        command._report(AssertionError())
    assert capsys.readouterr().err.startswith(
        "error: JAX finds no device of JAX_PLATFORMS=cuda: set another one"
    )


def test_what_orbax_leaves_after_an_error_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def read() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            raise OSError

    monkeypatch.setattr(sys, "unraisablehook", console._report_unraisable)
    coroutine = read()
    coroutine.send(None)
    del coroutine
    assert capsys.readouterr().err == ""


@pytest.mark.process
def test_a_closed_pipe_is_not_an_error(trained: Path) -> None:
    command = f"{sys.executable} -m lstm_jax.sample --workdir {trained} --length 100000 | head -c 5"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=120, cwd=ROOT
    )
    assert (result.returncode, result.stderr, len(result.stdout)) == (0, b"", 5)


def test_any_text_is_measured_like_a_split(trained: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_bytes(text_file.read_bytes()[18_000:19_000])

    def measure(*flags: str) -> dict[str, Any]:
        result = run("evaluate", f"--workdir={trained}", *flags, cwd=tmp_path)
        measured: dict[str, Any] = json.loads(result.stdout)
        return measured

    (tmp_path / "last.txt").write_bytes(text_file.read_bytes()[18_000:])
    for name, path in (("validation", "validation.txt"), ("validation+test", "last.txt")):
        split, text = measure(f"--split={name}"), measure(f"--text={path}")
        assert text.pop("text") == path and text.pop("unknown_tokens") == 0
        assert split.pop("split") == name and text == split
    loaded = workdir.load_trained(trained)
    ids = loaded.vocabulary.encode(text_file.read_text())
    # The gradients are measured on the training text.
    members, settings = [(loaded.model, loaded.params)], dynamic.Settings(1e-3, 0.003, 50)
    parts = dynamic.adapt_to_text(members, ids[:18_000], ids[18_000:], settings)
    expected = np.concatenate([*parts]).mean(dtype=np.float64)
    for flag in ("--split=validation+test", "--text=last.txt"):
        assert measure("--dynamic", flag)["loss"] == pytest.approx(expected, rel=1e-6)

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
        ("日本語".encode(), "the model knows none of the characters in standard input"),
        (b"caf\xe9", "is not UTF-8 at byte 3"),
    ],
)
def test_a_text_that_cannot_be_measured_gives_one_line(
    content: bytes, message: str, trained: Path
) -> None:
    result = run("evaluate", f"--workdir={trained}", "--text=-", given=content)
    assert result.returncode == 2 and not result.stdout
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_unknown_tokens_of_a_text_cost_bits(trained: Path, tmp_path: Path) -> None:
    text = "To \x1b\x7f日!\n"
    result = run("evaluate", f"--workdir={trained}", "--text=-", cwd=tmp_path, given=text)
    last = json.loads(result.stdout)
    assert last["unknown_tokens"] == 3
    # Each unknown token costs the bits of its UTF-8, and of a byte for its end.
    bits = (last["bits_per_token"] * 7 + 8 * (2 + 2 + 4)) / 7
    assert last["bits_per_character"] == pytest.approx(bits)


@pytest.mark.process
def test_any_name_is_printed_in_any_encoding(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "caf\u00e9 \u732b.html"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "lstm_jax.export", f"--workdir={trained}", f"--to={out}"),
            "--length=100",
        ],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0 and out.is_file(), result.stderr
    assert str(out).encode("ascii", "backslashreplace") in result.stdout


@pytest.mark.parametrize("module", ["main", "sample", "evaluate", "sweep", "convert", "export"])
def test_help(module: str) -> None:
    result = run(module, "--help", cwd=ROOT)
    assert result.returncode == 0 and result.stderr == ""
    assert f"python -m lstm_jax.{module} " in result.stdout and "--workdir" in result.stdout
    assert ("--config.optimizer.learning_rate=0.0001" in result.stdout) == (
        module in ("main", "sweep")
    )
    takes_text = module in ("evaluate", "export")
    assert ("--data_path: " in result.stdout) == takes_text, "flags that commands share"


def test_help_lists_each_field_within_the_width_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = run("main", "--help")
    _, _, table = result.stdout.partition("Fields of the config")
    assert result.returncode == 0 and "1_000 is 1000" in table
    text = " ".join(table.split())
    for field in config.FIELDS:
        assert f"- --config.{field.name}={field.default!r}" in table
        assert f" {field.meaning} Allowed: {field.allowed.words}" in text
    lines = [line for line in table.splitlines() if not line.startswith("- ")]
    assert max(map(len, lines)) <= 60


@pytest.mark.slow
def test_a_field_without_effect_gives_a_warning(text_file: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"--config.data.path={text_file}", "--config.max_steps=1"]
    result = run("main", *arguments, "--config.optimizer.momentum=0.5", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == (
        "warning: config.optimizer.momentum is 0.5, which has no effect: it needs "
        "optimizer.name='sgd' or 'muon'\n"
    )


BAD_CONFIGS = {
    "raises.py": "def get_config():\n    return 1 / 0\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "none.py": "def get_config(): pass\n",
    "value.py": "def get_config():\n    return int('a wrong value')\n",
    "calls.py": "import os\ndef get_config(): return os.environ['NOTHING']\n",
    "opens.py": "def get_config():\n    return open('settings.json')\n",
    "json.py": "import json\ndef get_config(): return json.loads('a')\n",
    "argument.py": "def get_config(word='none'): raise ValueError(f'the word {word}')\n",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main"], "specify an experiment: --config experiments/quick.py"),
        (["main", "--init_from=.", "--config.data.path=good.txt"], "no trained model in ."),
        (["main", "--config=nothing.py"], "nothing.py"),
        (["main", "--config=raises.py"], "raises.py, line 2: ZeroDivisionError"),
        (["main", "--config=syntax.py"], "syntax.py, line 1"),
        (["main", "--config=empty.py"], "config file empty.py has no function get_config()"),
        (["main", "--config=none.py"], "the config is a NoneType"),
        (["main", "--config=value.py"], "value.py, line 2: ValueError"),
        (["main", "--config=calls.py"], "calls.py, line 2: KeyError: 'NOTHING'"),
        (["main", "--config=opens.py"], "opens.py, line 2: FileNotFoundError: [Errno 2] No such"),
        (["main", "--config=json.py"], "json.py, line 2: JSONDecodeError: Expecting value"),
        (["main", "--config=argument.py:gru"], "the word gru"),
        (["main", "--config", f"{QUICK}:gru"], "get_config"),
        (["main", "--config", QUICK, "--config.model.cell=gur"], "model.cell is 'gur'"),
        (
            ["main", *TINY, "--config.model.cell=slstm", "--config.model.recurrence=xla"],
            "only the cells lstm, peephole, gru and rnn",
        ),
        (["evaluate", "--workdir=.", "--dynamic", "--context=9"], "use only one of them"),
        (["evaluate", "--workdir=.", "--dynamic_segment_length=0"], "range [1, 1000000000]"),
        (["evaluate", "--workdir=.", "--dynamic_learning_rate=nan"], "0 or more, and finite"),
        (["evaluate", "--workdir=.", "--dynamic_decay=0.1"], "no effect without --dynamic"),
        (["evaluate", "--workdir="], "--workdir is empty"),
        (["main", "--config", QUICK, "--workdir="], "--workdir is empty"),
        (["evaluate", "--workdir=.", "--text=good.txt", "--split=test"], "leave one out"),
        (["main", "--config", QUICK, "--config.model.hiden_size=3"], "did you mean model.hidden"),
        (["main", "--config", QUICK, "--config.model.hidden_size=3.5"], "'3.5'"),
        (
            ["main", "--config.num_epochs=3"],
            "--config.num_epochs needs an experiment: add --config",
        ),
        (["main", f"--config={ROOT}/experiments/cells.py:foo"], "choose from lstm, gru, rnn"),
        (["main", "--config=12:30/none.py"], "there is no config file 12:30/none.py"),
        (["main", "--config", QUICK, "--config.optimizer.lr=1"], "optimizer.learning_rate, "),
        (["main", "--config", QUICK, "--config.num_epochs=three"], "not an integer: 'three'"),
        (["main", "--config", QUICK, "--config.optimizer.step_at=('a','b')"], "between 0 and 1"),
        (["main", "--config", QUICK, "--config.data.path=."], ". is a directory: name its files"),
        (["main", "--config", QUICK, "--wordir=x"], "workdir"),
        (["main", "--config", QUICK, "stray"], "'stray'"),
        (["main", "--config", QUICK, "--config.data.path=nothing.txt"], "no text file nothing.txt"),
        (
            ["main", "--config", QUICK, "--config.data.path=zero.txt"],
            "the train split is too short",
        ),
        (["main", "--config", QUICK, "--config.data.path=short.txt"], "too short"),
        (["main", *TINY, "--config.data.path=good.txt", "--workdir=zero.txt/run"], "can't write"),
        (["sample"], "--workdir DIR"),
        (["sample", "--workdir=.", "--prompt=caf\udce9"], "is not UTF-8"),
        (["sample", "--workdir=.", "--length=1000001"], "length"),
        (["sample", "--workdir=."], "no trained model in ."),
        (["sample", "--workdir=.", "--temperature=-0.5"], "temperature is -0.5"),
        (["sample", "--workdir=.", "--prompt=a", "--prompt_file=b"], "either --prompt or"),
        (["sample", f"--num_samples={10**20}", "--workdir=."], "it must be from 1 to 100,000"),
        (["sample", f"--workdir={'n' * 300}"], "nnn: File name too long"),
        (["main", "--config", QUICK, f"--config.data.path={'n' * 300}"], "no text file nnn"),
        (["main", *TINY, "--config.data.path=good.txt", f"--workdir={'n' * 300}"], "too long"),
        (["convert", "--workdir=x"], "give --workdir DIR, and either --from FILE"),
        (["convert", "--workdir=x", "--from=good.txt"], "must end in .safetensors"),
        (["convert", "--workdir=x", "--from=a.safetensors", "--text=good.txt"], "No such file"),
        (["evaluate", "--workdir=.", "--split=nothing"], "train, validation, test"),
    ],
    ids=lambda value: " ".join(value).replace(QUICK, "quick") if isinstance(value, list) else "",
)
def test_a_mistake_gives_a_one_line_error_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, text_file: Path
) -> None:
    for name, content in BAD_CONFIGS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "zero.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_text("To be or not to be, that is the question. " * 10)
    (tmp_path / "good.txt").write_bytes(text_file.read_bytes())
    before = sorted(os.listdir(tmp_path))
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr
    assert sorted(os.listdir(tmp_path)) == before, "nothing is left behind"


def test_a_text_of_documents_that_are_files_ends_with_their_stop_token(tmp_path: Path) -> None:
    fields = config.default()
    fields.data.document_separator, fields.model.embedding_size = "file", 4
    fields.model.hidden_size = 6
    vocabulary = Vocabulary.from_text(f"ab{FILE_END}", stop=FILE_END)
    model = model_lib.make_model(fields.model, len(vocabulary), vocabulary.stop_id)
    params = models.draw_params(model, 0.1)
    transfer.make_folder(tmp_path / "run", fields, vocabulary, params)
    flags = ["evaluate", f"--workdir={tmp_path / 'run'}", "--text=-"]
    assert json.loads(run(*flags, given="abba").stdout)["tokens"] == 4
