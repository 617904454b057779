"""The benchmark of recurrences runs, at a small size."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


ROOT = Path(__file__).parents[1]


def test_every_recurrence_of_a_cell_is_timed() -> None:
    flags = ["--variants", "lstm,mingru", "--lengths", "4", "--rounds", "1"]
    command = [sys.executable, "benchmarks/recurrences.py", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [line.split("|")[1:-1] for line in process.stdout.splitlines() if line.startswith("| ")]
    assert [(cell.strip(), recurrence.strip()) for cell, _, recurrence, _ in rows[2:]] == [
        ("lstm", "scan"),
        ("lstm", "fused"),
        ("mingru", "scan"),
        ("mingru", "parallel"),
    ]
    assert all(float(milliseconds) > 0 for *_, milliseconds in rows[2:])
