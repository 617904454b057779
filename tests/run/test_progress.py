"""Test the progress that training prints."""

import sys

import pytest

from lstm_jax.run import progress


def test_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = progress.Progress(step=100, total_steps=300, steps_per_epoch=150, shown=True)
    now = 1.0
    shown.update(110, 2.5, 1234.5)  # Too early for a line.
    now = 50.0
    shown.update(200, 2.25, 4321.0)
    shown.close()
    output = capsys.readouterr()
    assert output.out == "step 200/300, epoch 1.33, loss 2.250, 4,321 tokens/s, 0:50 left\n"
    assert output.err == ""


def test_the_time_left_excludes_compilation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = progress.Progress(step=0, total_steps=101, steps_per_epoch=101, shown=True)
    shown.start_clock(0)  # After the first validation.
    now = 30.0
    shown.update(1, 2.5, 0.0)
    shown.start_clock(1)
    now = 50.0
    shown.update(21, 2.25, 4321.0)
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("loss ")[2] for line in lines] == [
        "2.500, 50:00 left",  # The speed was not measured yet.
        "2.250, 4,321 tokens/s, 1:20 left",
    ]


@pytest.mark.parametrize("early", [False, True])
def test_the_bar_ends_at_100_percent(
    early: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = progress.Progress(0, 410 if early else 205, 205, shown=True)
    now = 30.0
    shown.start_clock(5)
    now = 40.0
    shown.update(105, 2.25, 4321.0)
    shown.update(195, 2.0, 4321.0)
    shown.start_clock(205)
    if early:
        shown.finish(205)
    shown.close()
    output = capsys.readouterr()
    last = output.err.split("\r")[-1]
    assert last.startswith("step 205/205, epoch 1.00, loss 2.000, 4,321 tokens/s 100%")
    assert "0:00 left" in last and output.out == ""
