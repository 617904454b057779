"""Test the trained model in the package."""

import hashlib
import re
from pathlib import Path

import pytest

import commands
import lstm_jax
from lstm_jax import loss as loss_lib
from lstm_jax.run import workdir

NAME = "tiny-shakespeare"
# `make pretrained` writes another model: change both with it.
SHA256 = "48baedbe79c56d0bc0fc010c8de835753f64e1f3b682f224ed455e01a27a1972"
SAMPLE = "ROMEO:\nI will not speak to the contrary.\n\nCAPULET:\nWhat says he?\n\n"


@pytest.fixture(scope="module")
def run() -> lstm_jax.Run:
    return lstm_jax.load(NAME, "float32")


def test_it_is_small_and_has_the_checksum_of_this_test() -> None:
    folder = workdir.find_model(NAME)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_200_000
    content = (folder / workdir.MODEL).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256


def test_it_generates_a_fixed_text(run: lstm_jax.Run) -> None:
    assert run.generate("ROMEO:", length=60, temperature=0) == SAMPLE


@pytest.mark.slow
def test_its_test_loss_is_that_of_its_card(run: lstm_jax.Run, shakespeare: dict[str, str]) -> None:
    card = (workdir.find_model(NAME) / "README.md").read_text()
    (stored,) = re.findall(r"Losses as stored, .*, test (\d\.\d+) nats", card)
    ids = run.vocabulary.encode(shakespeare["test"])
    loss = loss_lib.compute_loss(run.model, run.params, ids)
    assert loss == pytest.approx(float(stored), abs=0.003) and loss < 1.4


@pytest.mark.slow
def test_commands_take_its_name_and_write_nothing_beside_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ROMEO:\nBut, soft! what light through yonder window breaks?\n" * 9)
    sizes = [f"--config.data.path={text}", "--config.batches.batch_size=2"]
    sizes += ["--config.batches.window_length=9", "--config.sample.length=3"]
    folder = workdir.find_model(NAME)
    before = sorted(folder.iterdir())
    for arguments in (
        ["sample", "--length=5", f"--model={NAME}"],
        ["sample", "--length=5", f"--workdir={NAME}"],
        ["evaluate", f"--text={text}", f"--model={NAME}"],
        ["export", f"--text={text}", f"--model={NAME}"],
        ["convert", "--to=copy", f"--model={NAME}"],
        ["main", f"--init_from={NAME}", "--config.max_steps=1", "--workdir=run", *sizes],
    ):
        commands.get_output(*arguments, cwd=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"text.txt", "page.html", "copy", "run"}
    assert sorted(folder.iterdir()) == before


def test_a_directory_of_this_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lstm_jax.UserError, match=f"no trained model in '{NAME}' "):
        lstm_jax.load(NAME)


@pytest.mark.parametrize("name", ["tiny-shakespear", "../pretrained/tiny-shakespeare"])
def test_another_name_gives_one_line(name: str, tmp_path: Path) -> None:
    result = commands.run("sample", f"--model={name}", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "there is no trained model in" in result.stderr
    assert f"or {NAME}, or train one" in result.stderr
