import pytest

from lstm_jax import progress


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = progress.Progress(step=100, total_steps=300, steps_per_epoch=150)
    now = 1.0
    shown.update(110, 2.5, 1234.5)  # Too soon after the start for a line.
    now = 50.0
    shown.update(200, 2.25, 4321.0)
    shown.print("by the way")
    shown.close()
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "step 200/300, epoch 1.33, loss 2.250, 4,321 tokens/s, 0:50 left",
        "by the way",
    ]
    assert output.err == ""
