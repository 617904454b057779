"""Test damaged files of a working directory."""

import json
from pathlib import Path

import pytest

import lstm_jax
from lstm_jax.errors import UserError
from lstm_jax.run import workdir


def test_an_error_names_a_missing_or_damaged_file(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="no trained model in .*no config.json"):
        lstm_jax.load(tmp_path)
    (tmp_path / workdir.CONFIG).write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        lstm_jax.load(tmp_path)
    (tmp_path / workdir.CONFIG).write_bytes((trained / workdir.CONFIG).read_bytes())
    with pytest.raises(UserError, match="vocabulary.json is missing or damaged"):
        lstm_jax.load(tmp_path)
    (tmp_path / workdir.VOCABULARY).write_bytes((trained / workdir.VOCABULARY).read_bytes())
    with pytest.raises(UserError, match="no checkpoint in .* yet"):
        lstm_jax.load(tmp_path)


@pytest.mark.parametrize("name", [workdir.CONFIG, workdir.VOCABULARY])
def test_any_flipped_byte_is_detected(name: str, tmp_path: Path, trained: Path) -> None:
    load = {workdir.CONFIG: workdir.load_config, workdir.VOCABULARY: workdir.load_vocabulary}[name]
    content = (trained / name).read_bytes()
    expected = json.loads(content)
    count = 0
    places = range(0, len(content), 5)
    for at in places:
        flipped = content[:at] + bytes([content[at] ^ 0x04]) + content[at + 1 :]
        (tmp_path / name).write_bytes(flipped)
        try:
            load(tmp_path)
        except UserError as error:
            assert f"{name} is" in str(error) and "damaged" in str(error)
            count += 1
        else:
            assert json.loads(flipped) == expected, "only white space may change unnoticed"
    assert count > 0.6 * len(places)


def test_restoring_drops_later_history_and_warns_about_lost_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / workdir.METRICS).write_text("first\n")
    sizes = workdir.measure_history(tmp_path)
    (tmp_path / workdir.METRICS).write_text("first\nsecond\n")
    (tmp_path / workdir.SAMPLES).write_text("not there when saved")
    (tmp_path / "notes.txt").write_text("of the user's")
    workdir.truncate_history(tmp_path, {**sizes, "../notes.txt": 0})
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {workdir.METRICS: "first\n", workdir.SAMPLES: "", "notes.txt": "of the user's"}
    assert capsys.readouterr().err == ""
    (tmp_path / workdir.METRICS).write_text("fir")
    workdir.truncate_history(tmp_path, sizes)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / workdir.METRICS} has lost some of its content\n"
    )
