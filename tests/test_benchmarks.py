"""Benchmarks run at a small size, and treat other libraries like this one."""

import argparse
import functools
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SIZES = {
    **{"batch_size": 2, "window_length": 3, "num_samples": 2, "length": 3},
    **{"embedding_size": 4, "hidden_size": 5, "num_layers": 2, "vocabulary_size": 7},
}


@pytest.mark.slow
def test_every_recurrence_of_a_cell_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import recurrences

    monkeypatch.setattr(recurrences, "TOKENS", 8)
    flags = ["--variants=lstm,mingru", "--lengths=4", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", ["recurrences.py", *flags])
    recurrences.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in printed if line.startswith("| ")]
    assert [(cell.strip(), recurrence.strip()) for cell, _, recurrence, _ in rows[2:]] == [
        *(("lstm", "scan"), ("lstm", "fused"), ("mingru", "scan"), ("mingru", "parallel"))
    ]
    assert all(float(milliseconds) > 0 for *_, milliseconds in rows[2:])


def serve(make: Any) -> list[float]:
    """Return the seconds of a turn of a contestant."""
    import side_by_side

    ours, theirs = multiprocessing.Pipe()
    ours.send("run")
    ours.send("")
    side_by_side._serve(theirs, make, argparse.Namespace(**SIZES, dtype="float32"))
    device, reason = ours.recv()
    assert device and not reason
    return list(ours.recv())


@pytest.mark.slow
def test_every_library_keeps_the_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers
    import side_by_side
    import train_step

    calls: list[str] = []
    monkeypatch.setattr(side_by_side.memory, "keep_freed_memory", lambda: calls.append("kept"))
    flax = functools.partial(train_step.make_peer, peers.MODELS["Flax OptimizedLSTMCell"])
    assert len(serve(flax)) == 1
    assert calls == ["kept"]
    pytest.importorskip("torch")
    assert len(serve(train_step.make_torch)) == 1
    assert calls == ["kept", "kept"]


def test_the_steps_of_a_peer_read_like_its_sequences() -> None:
    import jax
    import numpy as np

    import peers

    options = argparse.Namespace(**SIZES, dtype="float32")
    init, apply, carry = peers.MODELS["Flax LSTMCell"](options, 2)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    params = init(jax.random.key(0), ids, carry)
    expected, _ = apply(params, ids, carry)
    for i in range(3):
        logits, carry = apply(params, ids[:, i : i + 1], carry)
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-6)


def test_pytorch_converts_its_parameters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = pytest.importorskip("torch")
    import sampling

    monkeypatch.delattr(torch, "autocast")
    options = argparse.Namespace(**SIZES, dtype="bfloat16")
    generated: Any = sampling._torch(options).run()
    assert generated.shape == (2, 3)
